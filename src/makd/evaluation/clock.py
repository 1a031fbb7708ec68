"""Station 8: seconds of things that take turns, so that a machine that slows down does so for all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP = 3
"""Turns that are not counted: the first calls set up kernels and memory."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one of several things that took turns took."""

    milliseconds: float
    """Median of the turns."""
    fastest: float
    """Milliseconds of the fastest turn: the least disturbed by whatever else ran on the machine."""
    ratio: float
    """Median over the turns of its time / the first thing's time in the same turn."""


@torch.no_grad()
def take_turns(
    things: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    warm_up: int = WARM_UP,
    pause: float = 0.0,
) -> dict[str, Timing]:
    """Call the `things` one after the other, `repeats` times over; each begins as many turns as the others.

    Args:
        things: name -> what is called. Ratios are to the first.
        repeats: turns that count, at least 1.
        device: waited for before and after each call.
        warm_up: turns before those.
        pause: seconds before each call: threads of another runtime wait in a loop for a while after theirs, on the
            cores that are wanted next.
    """
    names = list(things)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm_up + repeats):
        first = turn // 2 % len(names)
        order = (*names[first:], *names[:first])
        for name in order[:: -1 if turn % 2 else 1]:  # who comes after whom changes what is in the caches
            wait(device)
            time.sleep(pause)
            start = time.perf_counter()
            things[name]()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    counted = {name: values[warm_up:] for name, values in seconds.items()}
    return {
        name: Timing(
            milliseconds=1000 * statistics.median(values),
            fastest=1000 * min(values),
            ratio=statistics.median(own / other for own, other in zip(values, counted[names[0]], strict=True)),
        )
        for name, values in counted.items()
    }


def wait(device: torch.device) -> None:
    """Until `device` has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
