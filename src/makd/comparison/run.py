"""Station 10: the comparison: one cell after the other, a line for each, and on from where it was stopped."""

import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from makd.anatomy import resolve
from makd.comparison.cells import Cell, all_cells, cell_hash, select
from makd.comparison.ground import Ground, prepare_ground
from makd.comparison.results import append_line, read_lines
from makd.comparison.search import Found, check_optuna, find_settings, known_settings
from makd.comparison.settings import Experiment
from makd.comparison.teach import teach
from makd.evaluation import fingerprint, latency, parameter_counts
from makd.pipeline import Progress
from makd.report import describe_environment
from makd.tasks import TaskConfig

logger = logging.getLogger(__name__)

RESULTS_FILE = "results.jsonl"
"""In the output folder: a line for each cell."""


def compare(
    experiment: Experiment,
    *,
    only: str | None = None,
    limit: int | None = None,
    on_progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run those cells of `experiment` that are not in its output folder yet.

    Args:
        experiment: what is compared.
        only: cells to keep to, such as `task=mrpc,method=makd,seed=1`.
        limit: at most so many cells are run now.
        on_progress: called as the work goes on, for progress bars.

    Returns:
        The lines of the cells that `only` names, those that were there before included.

    Raises:
        MakdError: with what was wrong, which value, and what is allowed. Lines that were written stay.
    """
    progress = on_progress or (lambda what, done, of: None)
    chosen = select(all_cells(experiment), only)
    lines = done_lines(experiment, chosen)
    grounds = _Grounds(experiment, progress)
    waiting = [cell for cell in chosen if str(cell) not in lines][:limit]
    if waiting and experiment.search.trials:
        check_optuna()
    try:
        found = find_settings(experiment, waiting, grounds.of, progress)
        lines |= done_lines(experiment, waiting)  # those that a search has led back to
        waiting = [cell for cell in waiting if str(cell) not in lines]
        for number, cell in enumerate(waiting, start=1):
            logger.info("cell %d/%d: %s", number, len(waiting), cell)
            line = lines[str(cell)] = _run(experiment, cell, grounds.of(cell), found[str(cell)], progress)
            append_line(Path(experiment.output) / RESULTS_FILE, line)
            logger.info("%s: score %.4f in %.0f s", cell, line["score"], line["seconds"]["total"])
    finally:
        grounds.close()
    return [lines[str(cell)] for cell in chosen if str(cell) in lines]


def done_lines(experiment: Experiment, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """The lines of those `cells` that were run with the experiment's present settings, by the cells' text.

    Of a method whose search is not over no line is known: its settings are open.
    """
    known = known_settings(experiment, cells)
    hashes = {cell_hash(experiment, cell, found): cell for cell in cells if (found := known[str(cell)]) is not None}
    found = {}
    for line in read_lines(Path(experiment.output) / RESULTS_FILE):
        cell = hashes.get(line["hash"])
        if cell is not None and line["cell"] == cell.names:
            found[str(cell)] = line
    return found


class _Grounds:
    """The ground of the last task and seed: the cells of one follow each other, and two teachers would take room."""

    def __init__(self, experiment: Experiment, progress: Progress) -> None:
        self.experiment, self.progress = experiment, progress
        self._last: tuple[tuple[TaskConfig, int], Ground] | None = None

    def of(self, cell: Cell) -> Ground:
        """The ground of a cell."""
        key = cell.task, cell.seed
        if self._last is None or self._last[0] != key:
            self.close()
            self._last = key, prepare_ground(self.experiment, cell.task, cell.seed, self.progress)
        return self._last[1]

    def close(self) -> None:
        """Remove what the last one keeps on disk for its cells alone."""
        if self._last is not None and self._last[1].caches is not None:
            self._last[1].caches.close()
        self._last = None


def _run(experiment: Experiment, cell: Cell, ground: Ground, found: Found, progress: Progress) -> dict[str, Any]:
    method: Any = cell.method.build(**found)
    taught = teach(ground, method, cell.budget, cell.method.lengthened(experiment.training), cell.seed, progress)
    pair = {"teacher": ground.teacher, "student": taught.student}
    counts = {side: parameter_counts(model, resolve(model)) for side, model in pair.items()}
    timed: dict[str, dict[str, float]] = {}
    if experiment.latency:
        for batch, repeats in ((1, 15), (16, 5)):
            timed[f"batch{batch}"] = latency(pair, batch, experiment.latency_tokens, repeats)
    return {
        "cell": cell.names,
        "score": taught.scores["score"],
        "metrics": taught.scores,
        "teacher": ground.teacher_scores,
        "majority": ground.majority,
        "params": counts,
        "steps": taught.steps,
        "tokens": taught.tokens,
        "seconds": {**taught.seconds, "total": sum(taught.seconds.values())},
        "latency_ms": timed,
        "settings": {item.name: getattr(method, item.name) for item in fields(method) if item.name != "search"},
        "fingerprint": fingerprint(taught.student),
        "hash": cell_hash(experiment, cell, found),
        "environment": describe_environment(ground.teacher.device, cell.seed),
    }
