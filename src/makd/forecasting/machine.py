"""Before the flow: how fast this machine is, by a few kernels that are timed now: counted operations -> seconds."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch.nn.functional import cross_entropy, gelu

from makd.forecasting.operations import Operations

_REPEATS = 3
"""Times that a kernel is timed; the fastest counts, which other work on the machine disturbed least."""
_SIDE = 768
"""Rows of the matrices that are multiplied."""
_EIGEN_SIDES = (192, 576)
"""Rows of the matrices whose eigenvectors are computed. Beyond the larger, time grows as the cube."""
_ELEMENTS = (512, 4096)
_LOGITS = (128, 8192)

LAYER_OVERHEAD = 6.0
"""Elementwise kernels (norms, activations, residuals, hooks) that a number of a layer passes through, about."""

THREADS_GAIN = 0.9
"""How much faster n threads are at one product or elementwise kernel: n to this power."""


@dataclass(frozen=True)
class MachineSpeed:
    """Of this machine, on one device."""

    products: float
    """Operations a second of matrix products in the model's dtype, with all threads."""
    single: float
    """The same in float32."""
    double: float
    """In float64, with all threads."""
    eigen: tuple[tuple[int, float], tuple[int, float]]
    """(rows, seconds) of the eigenvectors of two symmetric matrices in float64, one after the other."""
    elements: float
    """Numbers a second of an elementwise kernel."""
    logits: float
    """Logits a second from which predictions are drawn and differentiated."""
    beside: int = 1
    """Matrices that are decomposed at a time."""

    def seconds(self, work: Operations) -> float:
        """About how long `work` takes."""
        eigen = sum(count * self._eigen_seconds(size) for size, count in work.eigen.items())
        return (
            work.products / self.products
            + work.single / self.single
            + work.double / self.double
            + eigen / self.beside
            + LAYER_OVERHEAD * work.elements / self.elements
            + work.logits / self.logits
        )

    def _eigen_seconds(self, size: int) -> float:
        (small, fast), (large, slow) = self.eigen
        if size >= large:
            return slow * (size / large) ** 3
        power = math.log(slow / fast) / math.log(large / small)
        seconds: float = slow * (size / large) ** min(max(power, 1.0), 3.0)
        return seconds


@cache
def measure_machine(device: torch.device, dtype: torch.dtype) -> MachineSpeed:
    """Time a few kernels on `device`: about a second, once in a process.

    Of a CPU one core is timed, by what it computed: other work on the machine hardly changes that. All threads together
    are taken to be n ** `THREADS_GAIN` times as fast.

    Args:
        device: that the work will be done on.
        dtype: of the model.
    """
    if device.type != "cpu":
        return _measure(device, dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = _measure(device, dtype)
    finally:
        torch.set_num_threads(threads)
    gain = threads**THREADS_GAIN
    return replace(
        one,
        products=gain * one.products,
        single=gain * one.single,
        double=threads * one.double,  # decompositions are done side by side, each by one thread
        elements=gain * one.elements,
        beside=threads,
    )


def _measure(device: torch.device, dtype: torch.dtype) -> MachineSpeed:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32).to(device=device, dtype=dtype)

    def product(dtype: torch.dtype) -> float:
        one, other = drawn(_SIDE, _SIDE, dtype=dtype), drawn(_SIDE, _SIDE, dtype=dtype)
        return 2 * _SIDE**3 / _fastest(lambda: one @ other, device)

    def eigen(side: int) -> tuple[int, float]:
        rows = drawn(side, side, dtype=torch.float64)
        square = rows @ rows.T
        return side, _fastest(lambda: torch.linalg.eigh(square), device)

    def draw() -> None:
        logits.grad = None
        noise = -torch.empty(_LOGITS, device=device).exponential_().log()
        cross_entropy(logits, (logits.detach() + noise).argmax(-1), reduction="sum").backward()

    single = product(torch.float32)
    wide, logits = drawn(*_ELEMENTS), drawn(*_LOGITS).requires_grad_()
    small, large = map(eigen, _EIGEN_SIDES)
    with torch.enable_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        draws = _LOGITS[0] * _LOGITS[1] / _fastest(draw, device)
    return MachineSpeed(
        products=single if dtype == torch.float32 else product(dtype),
        single=single,
        double=product(torch.float64),
        eigen=(small, large),
        elements=_ELEMENTS[0] * _ELEMENTS[1] / _fastest(lambda: gelu(wide), device),
        logits=draws,
    )


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call; on a CPU those that it was computed for."""
    seconds = []
    for _ in range(_REPEATS + 1):  # the first sets up kernels
        if device.type == "cpu":
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
        else:
            torch.accelerator.synchronize(device)
            start = time.perf_counter()
            call()
            torch.accelerator.synchronize(device)
            seconds.append(time.perf_counter() - start)
    return max(min(seconds[1:]), 1e-9)
