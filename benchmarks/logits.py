"""Time and memory of the logits' KL, value and gradients, from hidden states and heads: in chunks against dense.

    python benchmarks/logits.py --dtype bfloat16 | tail -1 >> benchmarks/results/logits.jsonl

Dense is two whole logits and `logits_divergence`, which itself makes no float32 copy. Repeats of the two alternate, so
that what else runs on the machine slows both; ratios are chunked / dense, medians over the pairs. Processor seconds
are those of this process alone. Memory is the process's peak above what it held before, the head's gradient included
(Linux only).
"""

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor, nn

from makd.aspects import chunked_logits_loss, logits_divergence
from makd.capture import VocabularyHead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=576, help="of the hidden states")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    settings = parser.parse_args()

    torch.manual_seed(0)
    dtype = getattr(torch, settings.dtype)
    hidden = torch.randn(1, settings.tokens, settings.width, dtype=dtype)
    weight = (torch.randn(settings.vocabulary, settings.width) / settings.width**0.5).to(dtype)
    student, head = (hidden + 0.3 * torch.randn_like(hidden)).requires_grad_(), weight.clone().requires_grad_()

    def dense() -> Tensor:
        return logits_divergence(nn.functional.linear(student, head), nn.functional.linear(hidden, weight))

    def chunked() -> Tensor:
        return chunked_logits_loss(student, VocabularyHead(head), hidden, VocabularyHead(weight)).total

    measured: dict[str, list[tuple[float, float, float]]] = {"dense": [], "chunked": []}
    results: dict[str, list[Tensor]] = {}
    for repeat in range(settings.repeats + 1):
        for name, loss in (("dense", dense), ("chunked", chunked)):
            seconds, processor_seconds, megabytes, results[name] = measure(loss, [student, head])
            print(f"{name:8} {seconds:7.1f} s {megabytes:8.0f} MB{'' if repeat else '  (warm-up)'}", flush=True)
            if repeat:
                measured[name].append((seconds, processor_seconds, megabytes))
    medians = {
        name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in measured.items()
    }
    ratios = [
        statistics.median(own[column] / other[column] for own, other in zip(*reversed(measured.values()), strict=True))
        for column in range(3)
    ]
    line = {
        "benchmark": "logits",
        **vars(settings),
        "seconds": {name: round(values[0], 2) for name, values in medians.items()},
        "time_ratio": round(ratios[0], 3),
        "processor_seconds": {name: round(values[1], 2) for name, values in medians.items()},
        "processor_time_ratio": round(ratios[1], 3),
        "peak_mb": {name: round(values[2]) for name, values in medians.items()},
        "memory_ratio": round(ratios[2], 3),
        "largest_relative_difference": {
            name: float(f"{difference(*pair):.1e}")
            for name, pair in zip(("loss", "hidden", "weight"), zip(*results.values(), strict=True), strict=True)
        },
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {processor()}",
        "date": date.today().isoformat(),
    }
    print(json.dumps(line))


def measure(loss: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, float, float, list[Tensor]]:
    """(seconds, processor seconds, peak megabytes above the start, loss and gradients) of a forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here
    before, begun, processor_begun = status("VmRSS"), time.perf_counter(), time.process_time()
    value = loss()
    value.backward()
    seconds, processor_seconds = time.perf_counter() - begun, time.process_time() - processor_begun
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return seconds, processor_seconds, status("VmHWM") - before, [value.detach(), *gradients]


def status(name: str) -> float:
    """A line of this process's status, in megabytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


if __name__ == "__main__":
    main()
