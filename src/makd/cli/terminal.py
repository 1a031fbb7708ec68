"""What the commands share: tables on stdout, bars and log lines on stderr, and how SIGTERM ends them.

Imports rich only when something is shown.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 143
"""Exit code after SIGTERM, as shells have it."""

_WIDEST = 500
"""Columns that a table may take where there is no terminal."""


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """One bar for each kind of work, on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks or done < bars.tasks[tasks[what]].completed:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield progress


def print_table(renderable: Any) -> None:
    """Print a table of rich's: as wide as the terminal, or, into a file or pipe, wide enough for every number."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    if not console.is_terminal:
        needed = Measurement.get(console, console.options.update(width=_WIDEST), renderable).maximum
        console.width = max(console.width, needed)
    console.print(renderable)


def print_metrics(metrics: dict[str, Any], title: str) -> None:
    """Print what `metrics.json` holds."""
    from makd.report import metrics_table

    print_table(metrics_table(metrics, title))
    _print_seconds(metrics)


def print_scores(metrics: dict[str, Any], title: str) -> None:
    """Print how well a model does a task."""
    from makd.report import scores_table

    print_table(scores_table(metrics["task"], title))
    _print_seconds(metrics)


def _print_seconds(metrics: dict[str, Any]) -> None:
    print("seconds: " + "  ".join(f"{stage} {value:.0f}" for stage, value in metrics["seconds"].items()))


class Terminated(SystemExit):
    """SIGTERM came."""


@contextmanager
def unwinding_at_sigterm() -> Iterator[None]:
    """A scheduler's SIGTERM ends the block as an error does: what is temporary is removed, gigabytes of caches say.

    After the block SIGTERM does what it did before: whoever calls a command from Python has a handler of their own.
    """

    def end(*_: object) -> None:
        raise Terminated(TERMINATED)

    if threading.current_thread() is not threading.main_thread():  # no other may
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def set_up_logging() -> None:
    """Makd's own lines and the libraries' warnings go to stderr; the libraries' progress bars are silent."""
    import datasets
    from rich.console import Console
    from rich.logging import RichHandler
    from transformers.utils import logging as transformers_logging

    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False, markup=False)
    logger = logging.getLogger("makd")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
