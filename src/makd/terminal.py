"""What the commands share: tables on stdout, progress bars on stderr. Imports rich only when something is shown."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from makd.errors import MakdError


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
    """Print a table of rich's."""
    from rich.console import Console

    Console().print(renderable)


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


def plain_text(error: BaseException) -> str:
    """What a person needs of a parser's error: our own text, if one of ours is inside."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MakdError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error)
