"""Station 9: the warnings of a run, kept for its report."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

MOST = 200
"""Different warnings that are kept."""


class _Notes(logging.Handler):
    """Keeps what is logged, each text once, with how often it came."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: dict[tuple[str, str], int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Note one."""
        key = (record.levelname.lower(), record.getMessage())
        if key in self.counts or len(self.counts) < MOST:
            self.counts[key] = self.counts.get(key, 0) + 1


class Warnings:
    """What was warned of so far."""

    def __init__(self, notes: _Notes) -> None:
        """Reads `notes` when it is asked."""
        self._notes = notes

    def rows(self) -> list[dict[str, str | int]]:
        """Each text once, in the order in which they came first."""
        return [{"level": level, "text": text, "times": times} for (level, text), times in self._notes.counts.items()]


@contextmanager
def noting_warnings() -> Iterator[Warnings]:
    """Inside the block, what makd logs as a warning or worse is noted besides."""
    logger, notes = logging.getLogger("makd"), _Notes()
    logger.addHandler(notes)
    try:
        yield Warnings(notes)
    finally:
        logger.removeHandler(notes)
