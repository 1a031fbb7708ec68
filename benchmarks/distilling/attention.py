"""The attention aspect alone: makd's three ways and eager log-softmax, value and gradients, in turn.

`loss` is what training takes, the mean with its gradient in one pass; `kernel` and `tiles` give every query's KL.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilling.worker import resident
from makd.aspects import attention_kl, attention_loss

HEADS, HEAD_DIM = 12, 64
TOKENS = 2048
"""Of all texts together; a longer one is alone."""


def compare_attention(
    length: int, causal: bool, device: str, dtype: str, repeats: int, quick: bool = False
) -> dict[str, dict[str, Any]]:
    """Seconds and extra megabytes of each way, and their ratios to eager's."""
    shape = (1 if quick else max(1, TOKENS // length), HEADS, length, HEAD_DIM)
    kind: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    teacher = torch.randn(shape, **kind), torch.randn(shape, **kind)
    student = _near(teacher[0]), _near(teacher[1])
    ways: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: eager(*teacher, *student, causal),
        "loss": lambda: attention_loss(*teacher, *student, is_causal=causal),
        "kernel": lambda: attention_kl(*teacher, *student, is_causal=causal).mean(),
        "tiles": lambda: attention_kl(*teacher, *student, is_causal=causal, method="tiles").mean(),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    values: dict[str, list[Tensor]] = {}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            seconds, _, found = _measure(way, student, device, with_memory=False)
            if repeat:  # the first warms up; memory is of a call that is not timed
                measured[name].append((seconds, _measure(way, student, device, with_memory=True)[1]))
            values[name] = found
    eager_runs = measured["eager"]
    return {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in runs),
            "extra_mb": round(statistics.median(extra for _, extra in runs), 1),
            "time_ratio": round(statistics.median(a[0] / b[0] for a, b in zip(runs, eager_runs, strict=True)), 3),
            "memory_ratio": round(statistics.median(a[1] / b[1] for a, b in zip(runs, eager_runs, strict=True)), 3),
            "largest_difference": max(
                float((one - other).abs().max() / other.abs().max())
                for one, other in zip(values[name], values["eager"], strict=True)
            ),
            "batch": shape[0],
        }
        for name, runs in measured.items()
    }


def eager(
    query_teacher: Tensor, key_teacher: Tensor, query_student: Tensor, key_student: Tensor, causal: bool
) -> Tensor:
    """Mean KL from whole matrices of scores, in float32."""
    theirs, ours = ((q @ k.mT).float() * HEAD_DIM**-0.5 for q, k in ((query_teacher, key_teacher),
                                                                     (query_student, key_student)))  # fmt: skip
    if causal:
        ahead = torch.ones(ours.shape[-2:], dtype=torch.bool, device=ours.device).triu_(1)
        lowest = torch.finfo(torch.float32).min / 2
        theirs, ours = theirs.masked_fill(ahead, lowest), ours.masked_fill(ahead, lowest)
    pair = ours.log_softmax(-1), theirs.log_softmax(-1)
    return torch.nn.functional.kl_div(*pair, reduction="none", log_target=True).sum(-1).mean()


def _near(side: Tensor) -> Tensor:
    return (side + 0.3 * torch.randn_like(side)).requires_grad_()


def _measure(
    way: Callable[[], Tensor], leaves: Sequence[Tensor], device: str, with_memory: bool
) -> tuple[float, float, list[Tensor]]:
    """(seconds, peak megabytes above the start, gradients and value)."""
    for leaf in leaves:
        leaf.grad = None
    before = _start_memory(device) if with_memory else 0.0
    begun = _now(device)
    value = way()
    value.backward()
    seconds = _now(device) - begun
    extra = (_peak(device) - before) if with_memory else 0.0
    return seconds, extra, [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _start_memory(device: str) -> float:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


def _peak(device: str) -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident("VmHWM")
