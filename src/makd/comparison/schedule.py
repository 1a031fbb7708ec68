"""Station 10: what is left of a comparison, and which part of it can be done next, by one process or by many."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from makd.comparison.cells import Cell
from makd.comparison.done import done_lines
from makd.comparison.search import Found, known_settings, searched_at
from makd.comparison.settings import Experiment, short_name
from makd.comparison.setup import is_made, teacher_folder


class Kind(Enum):
    """What is done in a job."""

    SEARCH = "search"
    CELL = "cell"
    TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process does at a stretch, on one setup."""

    kind: Kind
    cell: Cell
    """Of a search, the cell that its trials have; of a teacher, any cell of its setup."""
    setup: Path
    """Folder of the teacher, which says what setup it is."""
    found: Found = field(default_factory=dict)
    """Of a cell: hyper-parameters of a search."""

    @property
    def has_teacher(self) -> bool:
        """Whether the teacher is there."""
        return is_made(self.cell.task, self.setup)


class Schedule:
    """Searches before the cells that need them, the first budget before the others, and one teacher for each setup."""

    def __init__(self, experiment: Experiment, cells: Sequence[Cell]) -> None:
        """`cells` are those to run."""
        self.experiment = experiment
        self.cells = len(cells)
        """How many cells there are in all; fewer once a search has led back to lines that are there."""
        self._running: list[Job] = []
        self._unsettled = list(cells)
        self._settled: list[Job] = []
        self._settle()
        searched = {str(cell): cell for cell in (searched_at(experiment, cell) for cell in self._unsettled)}
        # one task after the other, since a process keeps one setup
        ordered = sorted(searched.values(), key=lambda cell: short_name(cell.task))
        self._searches = [self._job(Kind.SEARCH, cell) for cell in ordered]

    @property
    def open_cells(self) -> int:
        """Cells that are not done, those that run now included."""
        running = [job for job in self._running if job.kind is Kind.CELL]
        return len(self._unsettled) + len(self._settled) + len(running)

    def take(self, last: Path | None) -> Job | None:
        """The next job for a process whose last job was on the setup of the teacher in `last`; None if none is free.

        A job is free if its teacher is there, or if nobody is about to make it. Of free jobs, those of searches and
        then of the first budget are taken first; of these, such as stay on the setup of the last one, then those that
        the fewest are on. Where cells wait for a search of others, their teachers are made meanwhile.
        """
        free = [job for job in (*self._searches, *self._settled) if self._is_free(job)]
        if free:
            job = min(free, key=lambda job: (self._stage(job), job.setup != last, self._crowd(job)))
            (self._searches if job.kind is Kind.SEARCH else self._settled).remove(job)
        else:
            teachers = (self._job(Kind.TEACHER, cell) for cell in self._unsettled)
            missing = next((job for job in teachers if not job.has_teacher and self._is_free(job)), None)
            if missing is None:
                return None
            job = missing
        self._running.append(job)
        return job

    def finish(self, job: Job) -> None:
        """A job that was taken is over."""
        self._running.remove(job)
        if job.kind is Kind.SEARCH:
            self._settle()

    def _settle(self) -> None:
        """Make jobs of the cells whose settings are known now; of those that have a line already there is none."""
        known = known_settings(self.experiment, self._unsettled)
        settled = [cell for cell in self._unsettled if known[str(cell)] is not None]
        done = done_lines(self.experiment, settled, known)
        self._unsettled = [cell for cell in self._unsettled if known[str(cell)] is None]
        waiting = [cell for cell in settled if str(cell) not in done]
        self._settled += [self._job(Kind.CELL, cell, known[str(cell)] or {}) for cell in waiting]
        self.cells -= len(done)

    def _job(self, kind: Kind, cell: Cell, found: Found | None = None) -> Job:
        return Job(kind=kind, cell=cell, setup=teacher_folder(self.experiment, cell.task, cell.seed), found=found or {})

    def _crowd(self, job: Job) -> int:
        return sum(other.setup == job.setup for other in self._running)

    def _is_free(self, job: Job) -> bool:
        return self._crowd(job) == 0 or job.has_teacher

    def _stage(self, job: Job) -> int:
        return 0 if job.kind is Kind.SEARCH else 1 if job.cell.budget == self.experiment.budgets[0] else 2
