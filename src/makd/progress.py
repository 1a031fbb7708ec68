"""How far the work is: which stage, how much of it is done, and what a person wants to see of it meanwhile.

Every stage of every command reports it in this form to whoever asked (`on_progress`): bars on a terminal, lines in a
pipe (`makd.cli.progress`), or a caller's own. Stands below all stations. What is reported is known already: nothing is
computed, and no accelerator waited for, to report it.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

One = TypeVar("One")


@dataclass(frozen=True)
class Progress:
    """How far a stage is."""

    what: str
    """The stage: `load`, `calibrate`, `gradients`, `decompose`, `fit layers`, `distil`, `evaluate`, `save`, …"""
    done: int
    """0 when it begins. A stage that begins again begins at 0 again."""
    of: int
    """`done` when the stage is over."""
    unit: str = ""
    """What is counted: steps, layers, batches. Empty where a number of them would say nothing."""
    tokens: int | None = None
    """Real tokens that the stage has read so far, where it counts them."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """`loss`, and each aspect's alone: means up to the last log line (`training.log_every` steps)."""


OnProgress = Callable[[Progress], None]
"""Called with a `Progress` after each unit of work. It must not take long: work waits for it."""


def nobody(_: Progress) -> None:
    """Show nothing."""


@contextmanager
def reporting(what: str, on_progress: OnProgress | None) -> Iterator[None]:
    """Report when the block begins, and when it is done: of work that cannot be counted."""
    report = on_progress or nobody
    report(Progress(what, 0, 1))
    yield
    report(Progress(what, 1, 1))


def track(items: Iterable[One], what: str, on_progress: OnProgress, unit: str = "batches") -> Iterator[One]:
    """The items, one after the other, reporting how many have been worked on."""
    listed = items if isinstance(items, Sized) else list(items)
    of = len(listed)
    on_progress(Progress(what, 0, of, unit))
    for done, item in enumerate(listed, start=1):
        yield item
        on_progress(Progress(what, done, of, unit))


def peak_bytes() -> int | None:
    """The most memory that this process ever had; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
