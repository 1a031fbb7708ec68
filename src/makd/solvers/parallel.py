"""Station 3: many small matrices at once, one on each core.

Decompositions of matrices of a few hundred or thousand rows hardly get faster with more threads; several of them side
by side do.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_cores(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device | str = "cpu"
) -> Iterator[Result]:
    """`function` of each item, in their order, as they are done; the first error is raised.

    On a CPU as many run at a time as torch may use threads, each with one, so that a result does not depend on their
    number. An accelerator takes one after the other: it is busy with one.
    """
    if torch.device(device).type != "cpu":
        yield from map(function, items)
        return
    workers = torch.get_num_threads()
    with _one_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(function, items)


@contextmanager
def _one_thread() -> Iterator[None]:
    """MKL's number of threads belongs to the process, OpenMP's to each thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
