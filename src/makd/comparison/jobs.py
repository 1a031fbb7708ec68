"""Station 10: one job, done: a teacher, a search's trials, or a cell and its line."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from makd.anatomy import resolve
from makd.comparison.cells import Cell, all_cells, build_method, cell_hash
from makd.comparison.done import RESULTS_FILE, done_lines
from makd.comparison.results import append_line
from makd.comparison.same_rows import check_rows
from makd.comparison.schedule import Job, Kind
from makd.comparison.search import Found, run_trials
from makd.comparison.settings import Experiment
from makd.comparison.setup import Setup, Setups, make_teacher
from makd.comparison.teach import teach
from makd.evaluation import fingerprint, parameter_counts
from makd.progress import OnProgress
from makd.run_folder import describe_environment
from makd.tasks import TaskConfig


def run_job(experiment: Experiment, job: Job, setups: Setups, progress: OnProgress) -> dict[str, Any] | None:
    """Do `job`; what comes of it is on disk when this returns.

    Returns:
        The line of a cell; None of a search or a teacher.

    Raises:
        OutputError: the rows are not those of the cells that are done.
    """
    cell, results = job.cell, Path(experiment.output) / RESULTS_FILE
    if job.kind is Kind.TEACHER:
        if isinstance(cell.task, TaskConfig):
            make_teacher(experiment, cell.task, cell.seed, progress)
        return None
    setup = setups.of(cell.task, cell.seed)
    alike = [other for other in all_cells(experiment) if other.task == cell.task]
    check_rows(done_lines(experiment, alike).values(), cell.seed, setup.digests, results)
    if job.kind is Kind.SEARCH:
        run_trials(experiment, cell, setup, progress)
        return None
    line = _run(experiment, cell, setup, job.found, progress)
    append_line(results, line)
    return line


def _run(experiment: Experiment, cell: Cell, setup: Setup, found: Found, progress: OnProgress) -> dict[str, Any]:
    method: Any = build_method(experiment, cell.method, found)
    taught = teach(setup, method, cell.budget, cell.method.lengthened(experiment.training), cell.seed, progress)
    pair = {"teacher": setup.teacher, "student": taught.student}
    return {
        "cell": cell.names,
        "score": taught.scores["score"],
        "metrics": taught.scores,
        "teacher": setup.teacher_scores,
        "rows": setup.digests,
        "majority": setup.majority,
        "params": {side: parameter_counts(model, resolve(model)) for side, model in pair.items()},
        "steps": taught.steps,
        "tokens": taught.tokens,
        "seconds": {**taught.seconds, "total": sum(taught.seconds.values())},
        "settings": {item.name: getattr(method, item.name) for item in fields(method) if item.name != "search"},
        "fingerprint": fingerprint(taught.student),
        "hash": cell_hash(experiment, cell, found),
        "environment": describe_environment(setup.teacher.device, cell.seed),
    }
