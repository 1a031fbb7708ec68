"""Station 10: a comparison as a page of markdown, with a plot of quality against budget."""

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from makd.comparison.cells import all_cells, latency_hash
from makd.comparison.done import done_lines
from makd.comparison.language_tables import LANGUAGE_SCORE, language_table
from makd.comparison.latencies import known_latencies
from makd.comparison.plot import can_draw, draw
from makd.comparison.settings import Experiment, budget_name, short_name
from makd.comparison.statistics import scores
from makd.comparison.tables import (
    Lines,
    cost_table,
    lead_table,
    mean_of,
    quality_table,
    scores_by_method,
    settings_table,
    share_of_teacher,
)
from makd.errors import OutputError
from makd.measures import TASK_LABELS

logger = logging.getLogger(__name__)

_COMMAND = "```text\nmakd compare "
"""How every page begins to say what wrote it."""


def write_page(experiment: Experiment, path: str | Path, name: str = "experiment.yaml") -> Path:
    """Write what is known of `experiment` to `path`, and beside it, with two budgets or more, a plot as `.svg`.

    Without matplotlib the page has no plot, and the log says so.

    Args:
        experiment: its output folder has the results; cells that were not run are left open.
        path: of the page; an older one is replaced, another file is not.
        name: of the experiment's file, for the command that the page tells.

    Returns:
        The path of the page.

    Raises:
        OutputError: no cell was run with these settings; or the page cannot be written, or would replace what is none.
    """
    check_page(Path(path))
    path, cells = Path(path), all_cells(experiment)
    lines = list(done_lines(experiment, cells).values())
    timed = known_latencies(experiment, cells)
    if not lines:
        raise OutputError(
            f"{experiment.output} has no cell with these settings yet. Run `makd compare {shlex.quote(name)}` first."
        )
    parts = [
        f"# {Path(name).stem}: {experiment.teacher}",
        _introduction(experiment, lines, list(timed.values()), len(cells), name),
    ]
    curves = _curves(experiment, lines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if curves and not can_draw():
            logger.warning("The page has no plot: `pip install makd[compare]` brings matplotlib, which draws it.")
        elif curves:
            plot = path.with_suffix(".svg")
            draw(curves, "parameters, of the teacher's", "average score, of the teacher's", plot)
            parts.append(f"![Quality against budget]({plot.name})")
        for budget in experiment.budgets:
            own = [line for line in lines if line["cell"]["budget"] == budget_name(budget)]
            if own:
                identities = {
                    cell.method.name: latency_hash(experiment, cell) for cell in cells if cell.budget == budget
                }
                theirs = {name: timed[identity] for name, identity in identities.items() if identity in timed}
                tables = (
                    quality_table(experiment, own),
                    language_table(experiment, own),
                    lead_table(experiment, own),
                    cost_table(experiment, own, theirs),
                )
                parts += [f"## {budget_name(budget)}", *(table for table in tables if table is not None)]
        parts += ["## Settings of the methods", settings_table(experiment, lines)]
        part = path.with_name(f".makd-{path.name}")
        part.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}. Name another file.") from error
    return path


def check_page(path: Path) -> None:
    """Refuse to write a page over what is none.

    Raises:
        OutputError: there is another file, or a plot without a page.
    """
    try:
        is_page = path.is_file() and _COMMAND in path.read_text(encoding="utf-8", errors="replace")
        for there in (path, path.with_suffix(".svg")):
            if there.exists() and not is_page:
                raise OutputError(f"{there} is there, and not of a page that makd wrote. Name another file.")
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}. Name another file.") from error


def _introduction(experiment: Experiment, lines: Lines, timed: Lines, total: int, name: str) -> str:
    labels = {
        short_name(task): " and ".join(TASK_LABELS.get(metric, metric) for metric in task.measured)
        for task in experiment.tasks
    }
    labels |= {language.name: LANGUAGE_SCORE for language in experiment.language}
    told = "; ".join(f"{task}: {metrics}" for task, metrics in labels.items())
    machines = "; ".join(dict.fromkeys(_machine(line["environment"]) for line in lines))
    latencies = "; ".join(dict.fromkeys(_machine(line["environment"]) for line in timed))
    return (
        f"{len(lines)} of {total} cells. Score of a task is the mean of its metrics ({told}).\n"
        f"Seeds {', '.join(map(str, experiment.seeds))}; all methods have the same teacher, rows, batches and steps.\n"
        f"\nTaught on: {machines}.\n"
        + (f"\nLatencies are of: {latencies}.\n" if latencies else "")
        + f"\n{_COMMAND}{shlex.quote(name)}\n```"
    )


def _machine(environment: Mapping[str, Any]) -> str:
    versions = environment["versions"]
    told = ", ".join(f"{package} {versions[package]}" for package in ("torch", "transformers", "makd"))
    return f"{environment['device_name']}, threads: {environment['threads']}, {told}"


def _curves(experiment: Experiment, lines: Lines) -> dict[str, list[tuple[float, float]]]:
    """Method -> (parameters, average) of each budget, as shares of the teacher's; empty with fewer than two budgets."""
    tasks = [short_name(task) for task in experiment.subjects]
    found: dict[str, list[tuple[float, float]]] = {}
    for budget in map(budget_name, experiment.budgets):
        own = [line for line in lines if line["cell"]["budget"] == budget]
        teacher = scores(own, lambda line: float(line["teacher"]["score"]))
        for name, values in scores_by_method(experiment, own).items():
            share = share_of_teacher(values, teacher, tasks)
            if share is not None:
                theirs = [line for line in own if line["cell"]["method"] == name]
                size = mean_of(theirs, "params", "student", "total") / mean_of(theirs, "params", "teacher", "total")
                found.setdefault(name, []).append((size, share))
    return found if max(map(len, found.values()), default=0) > 1 else {}
