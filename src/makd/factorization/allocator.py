"""Station 3: freed tensors give their memory back to the machine, and their addresses to the process.

glibc serves what is below a threshold from heaps that it keeps, and raises the threshold, to 32 MiB at most, whenever
larger memory is freed. A walk makes and frees activations, moments and matrices of all sizes: soon much of what it
holds are holes. A Llama-shaped model of width 1024 took 1.69 GB at most with the heaps and 1.28 GB without, in no more
time (`python benchmarks/forecast.py --hidden 1024 --layers 2 --rows 32`).
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Of glibc's mallopt."""
_OWN = 4 * 2**20
"""Bytes from which on memory is the tensor's own inside the block."""
_USUAL = 32 * 2**20
"""Where glibc's own threshold is after a while."""


@contextmanager
def giving_back() -> Iterator[None]:
    """Inside the block the memory of tensors of 4 MiB or more is their own, and goes when they do.

    Afterwards that begins at 32 MiB, as where glibc's rising threshold ends. With other C libraries nothing changes.
    """
    _set(_OWN)
    try:
        yield
    finally:
        _set(_USUAL)


def _set(size: int) -> None:
    option = _mallopt()
    if option is not None:
        option(_MMAP_THRESHOLD, size)
        option(_TRIM_THRESHOLD, 2 * size)


@cache
def _mallopt() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    # musl has a mallopt that does nothing, and no version of glibc's
    return library.mallopt if hasattr(library, "gnu_get_libc_version") else None
