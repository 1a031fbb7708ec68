"""Station 10: a comparison as a page of markdown, with a plot of quality against budget."""

import logging
import shlex
from pathlib import Path

from makd.comparison.all_results import budget_tables, introduction, read_results
from makd.comparison.plot import can_draw, draw
from makd.comparison.settings import Experiment, budget_name, short_name
from makd.comparison.statistics import scores
from makd.comparison.tables import (
    Lines,
    mean_of,
    scores_by_method,
    settings_table,
    share_of_teacher,
)
from makd.errors import OutputError

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
    path, results = Path(path), read_results(experiment, name)
    lines = results.lines
    parts = [
        f"# {Path(name).stem}: {experiment.teacher}",
        f"{introduction(experiment, results)}\n{_COMMAND}{shlex.quote(name)}\n```",
    ]
    curves = _curves(experiment, lines)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if curves and not can_draw():
            logger.warning("The page has no plot: `pip install 'makd[compare]'` brings matplotlib, which draws it.")
        elif curves:
            plot = path.with_suffix(".svg")
            draw(curves, "parameters, of the teacher's", "average score, of the teacher's", plot)
            parts.append(f"![Quality against budget]({plot.name})")
        for budget, tables in budget_tables(experiment, results):
            parts += [f"## {budget}", *(table.markdown for table in tables)]
        parts += ["## Settings of the methods", settings_table(experiment, lines).markdown]
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
