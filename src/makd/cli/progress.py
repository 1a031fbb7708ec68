"""How the work is shown while it goes on, on stderr: bars on a terminal, lines every so often in a pipe or a log.

`--quiet` shows nothing of it.
"""

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import TextIOBase
from typing import Any, TextIO

from makd.cli.stages import Stage, Stages, in_words, peak_memory
from makd.cli.terminal import terminal
from makd.progress import OnProgress, Progress, nobody

EVERY = 15.0
"""Seconds between two lines about one stage."""
SILENCE = 30.0
"""Seconds after which a line says that the work still goes on, though nothing was told of it."""


@contextmanager
def showing(quiet: bool = False) -> Iterator[OnProgress]:
    """Show what is told inside the block, as fits where stderr goes."""
    if quiet:
        yield nobody
    elif sys.stderr.isatty():
        with _bars() as hear:
            yield hear
    else:
        lines = Lines(sys.stderr)
        with lines.never_silent():
            yield lines.hear


class Lines:
    """A line when a stage begins, every so often while it lasts, and when it is over."""

    def __init__(self, stream: TextIO | TextIOBase, stages: Stages | None = None) -> None:
        self.stream, self.stages = stream, stages or Stages()
        self._lock = threading.Lock()
        self._written: dict[str, float] = {}
        """Stage -> when a line about it was last written."""
        self._last: Stage | None = None
        self._said = self.stages.clock()
        """When anything was said; at first, when the work began."""

    def hear(self, told: Progress) -> None:
        """Something was told."""
        with self._lock:
            stage, begins = self.stages.hear(told)
            is_told = stage.is_over and stage.is_told
            stage.is_told = stage.is_over
            due = not is_told and self.stages.clock() - self._written.get(told.what, 0.0) >= EVERY
            if begins or due or (stage.is_over and not is_told):
                self._write(stage, _line(stage, begins))

    def remind(self) -> None:
        """Say that the work still goes on, if nothing was said for long."""
        with self._lock:
            stage = self._last
            if self.stages.clock() - self._said < SILENCE:
                return
            if stage is None:
                self._say("still at work")
            else:
                after = "after it" if stage.is_over else "on it"
                self._say(f"{stage.last.what}: {stage.counted or 'begun'}, still at work {after}")

    @contextmanager
    def never_silent(self) -> Iterator[None]:
        """Inside the block somebody reminds."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(SILENCE / 6):
                self.remind()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()

    def _write(self, stage: Stage, line: str) -> None:
        self._written[stage.last.what] = self.stages.clock()
        self._last = stage
        self._say(line)

    def _say(self, line: str) -> None:
        self._said = self.stages.clock()
        print(f"makd: {line}", file=self.stream, flush=True)


def _line(stage: Stage, begins: bool) -> str:
    words = [stage.counted] if stage.counted else []
    if begins and not stage.is_over:
        words.append("begins")
    elif stage.is_over:
        words += [f"done in {in_words(stage.seconds)}", *stage.figures, *peak_memory()]
    else:
        left = stage.seconds_left
        words += [in_words(stage.seconds), *([] if left is None else [f"{in_words(left)} left"]), *stage.figures]
        words += peak_memory()
    return f"{stage.last.what}: {', '.join(words)}"


@contextmanager
def _bars() -> Iterator[OnProgress]:
    """A bar for each stage; below them pace and losses of the one that moves, and memory."""
    from rich import progress
    from rich.text import Text

    class Bars(progress.Progress):
        figures = Text()

        def get_renderables(self) -> Iterable[Any]:
            yield from super().get_renderables()
            yield self.figures

    stages, rows = Stages(), dict[int, progress.TaskID]()
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=20),
        progress.TextColumn("{task.fields[counted]}", justify="right"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[left]}"),
    )
    with Bars(*columns, console=terminal(), refresh_per_second=4) as bars:
        lock = threading.Lock()

        def hear(told: Progress) -> None:
            with lock:
                stage, begins = stages.hear(told)
                if begins:
                    rows[stage.number] = bars.add_task(told.what, total=told.of, counted="", left="")
                left = None if stage.is_over else stage.seconds_left
                words = "" if left is None else f"{in_words(left)} left"
                bars.update(rows[stage.number], completed=told.done, total=told.of, counted=stage.counted, left=words)
                bars.figures = Text("  ".join([*stage.figures, *peak_memory()]), style="dim")

        yield hear
