"""What work takes, measured: operations, and memory of tensors."""

import itertools

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

ATEN = torch.ops.aten
LAPACK = {
    ATEN.linalg_cholesky_ex: lambda matrix, *_, **__: matrix[-1] ** 3 / 3,
    ATEN.linalg_solve_triangular: lambda matrix, _right, *_, out_shape, **__: matrix[-1] * out_shape.numel(),
}
"""What these operations take of a dense matrix, which torch does not count; eigenvectors are counted apart."""


def counted(work):
    """Operations of what `work` does."""
    with FlopCounterMode(display=False, custom_mapping=LAPACK) as counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work):
    """The most that tensors on the CPU held at a time, of what `work` made."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))
