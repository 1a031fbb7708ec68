"""Station 10: a comparison as a page of markdown, with a plot of quality against budget."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from makd.comparison.cells import all_cells, latency_hash
from makd.comparison.done import done_lines
from makd.comparison.latencies import known_latencies
from makd.comparison.plot import can_draw, draw
from makd.comparison.settings import OURS, Experiment, budget_name, short_name
from makd.comparison.statistics import Mean, Scores, average, difference, mean, scores
from makd.errors import OutputError
from makd.report.tables import TASK_LABELS

logger = logging.getLogger(__name__)

Lines = Sequence[Mapping[str, Any]]

PARTS = ("total", "linears")
SPENT = (("steps",), ("tokens",), ("seconds", "total"))


def write_page(experiment: Experiment, path: str | Path, name: str = "experiment.yaml") -> Path:
    """Write what is known of `experiment` to `path`, and beside it, with two budgets or more, a plot as `.svg`.

    Without matplotlib the page has no plot, and the log says so.

    Args:
        experiment: its output folder has the results; cells that were not run are left open.
        path: of the page; replaced.
        name: of the experiment's file, for the command that the page tells.

    Returns:
        The path of the page.

    Raises:
        OutputError: no cell was run with these settings, or the page cannot be written.
    """
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
                parts += [
                    f"## {budget_name(budget)}",
                    quality_table(experiment, own),
                    cost_table(experiment, own, theirs),
                ]
        parts += ["## Settings of the methods", _settings_table(experiment, lines)]
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}. Name another file.") from error
    return path


def quality_table(experiment: Experiment, lines: Lines) -> str:
    """Scores of one budget: a row for each method, for the teacher and for the majority class."""
    tasks = [short_name(task) for task in experiment.tasks]
    by_method = _by_method(experiment, lines)
    teacher = scores(lines, lambda line: float(line["teacher"]["score"]))
    majority = scores(lines, lambda line: line["majority"])
    reference, told_reference = _reference(experiment, by_method, tasks)
    theirs: Scores = {} if reference is None else by_method.get(reference, {})
    head = ["", *tasks, "average", "of the teacher's", f"difference to {told_reference}"]
    rows = [_row("*teacher*", teacher, tasks, teacher), _row("*majority class*", majority, tasks, teacher)]
    rows = [[*row, ""] for row in rows]
    for name, found in by_method.items():
        told = told_reference if name == reference else _difference(found, theirs)
        rows.append([*_row(f"`{name}`", found, tasks, teacher), told])
    note = (
        "100 x the task's score, mean ± standard error over seeds. The average is over tasks, of seeds that have all. "
        "Differences are paired over task and seed, in 100 x the score and in standard errors (SE) with p of a "
        "two-sided t-test: over all pairs, which asks about tasks like these, and within tasks, over seeds alone, "
        "which asks about these very tasks."
    )
    return f"{_markdown(head, rows)}\n\n{note}"


def cost_table(experiment: Experiment, lines: Lines, timed: Mapping[str, Mapping[str, Any]]) -> str:
    """What each method cost at one budget: means over its cells.

    Args:
        experiment: whose methods are the rows.
        lines: cells of the budget.
        timed: what each method's student takes for a forward, by the method's name, and the teacher beside it; the
            teacher's own row has the median of them.
    """
    rows = []
    for method in experiment.methods:
        own = [line for line in lines if line["cell"]["method"] == method.name]
        if own:
            costs = [_mean(own, *keys) for keys in (*(("params", "student", part) for part in PARTS), *SPENT)]
            told = [f"{value:,.0f}" for value in costs]
            rows.append([f"`{method.name}`", *told, *_latencies(timed.get(method.name))])
    teacher = [f"{_mean(lines, 'params', 'teacher', part):,.0f}" for part in PARTS]
    beside = zip(*([found["teacher"] for found in line["latency_ms"].values()] for line in timed.values()), strict=True)
    rows.insert(0, ["*teacher*", *teacher, "", "", "", *([f"{median(taken):.1f}" for taken in beside] or ["", ""])])
    head = ["", "parameters", "of the linears", "steps", "tokens", "seconds", "ms, batch 1", "ms, batch 16"]
    return _markdown(head, rows)


def _latencies(line: Mapping[str, Any] | None) -> list[str]:
    """A student's milliseconds, and those of the teacher that took turns with it as the unit."""
    if line is None:
        return ["", ""]
    return [
        f"{taken['student']:.1f} ({taken['student'] / taken['teacher']:.2f}x)" for taken in line["latency_ms"].values()
    ]


def best_baseline(experiment: Experiment, by_method: Mapping[str, Scores], tasks: Sequence[str]) -> str | None:
    """Name of the row with the highest average of those that are no methods of ours; None if none has all tasks."""
    others = [method.name for method in experiment.methods if method.kind not in OURS]
    averages = {name: average(by_method[name], tasks) for name in others if name in by_method}
    known = {name: found.value for name, found in averages.items() if found is not None}
    return max(known, key=known.__getitem__) if known else None


def _reference(experiment: Experiment, by_method: Mapping[str, Scores], tasks: Sequence[str]) -> tuple[str | None, str]:
    """Name of the row that others are compared with, and how to say it. An ablation has no baselines: its first row."""
    if all(method.kind in OURS for method in experiment.methods):
        first = experiment.methods[0].name
        return first, f"`{first}`"
    return best_baseline(experiment, by_method, tasks), "the best baseline"


def _by_method(experiment: Experiment, lines: Lines) -> dict[str, Scores]:
    found: dict[str, Scores] = {}
    for method in experiment.methods:
        own = scores((line for line in lines if line["cell"]["method"] == method.name), lambda line: line["score"])
        if own:
            found[method.name] = own
    return found


def _row(name: str, found: Scores, tasks: Sequence[str], teacher: Scores) -> list[str]:
    cells = [_text(mean(value for (task, _), value in found.items() if task == wanted)) for wanted in tasks]
    share = _share(found, teacher, tasks)
    return [name, *cells, _text(average(found, tasks)), "" if share is None else f"{100 * share:.1f} %"]


def _share(found: Scores, teacher: Scores, tasks: Sequence[str]) -> float | None:
    """Share of the teacher's average, over the seeds of `found`."""
    own, theirs = average(found, tasks), average({key: teacher[key] for key in found}, tasks)
    return None if own is None or theirs is None or theirs.value <= 0 else own.value / theirs.value


def _text(found: Mean | None) -> str:
    if found is None:
        return ""
    error = "" if found.error is None else f" ± {100 * found.error:.2f}"
    return f"{100 * found.value:.2f}{error}"


def _difference(ours: Scores, theirs: Scores) -> str:
    found = difference(ours, theirs)
    if found is None:
        return ""
    errors = [
        f"{errors.count:+.1f} SE{where} (p {errors.probability:.2g})"
        for errors, where in ((found.overall, ""), (found.within, " within tasks"))
        if errors is not None
    ]
    return f"{100 * found.mean:+.2f}{' = ' if errors else ''}{', '.join(errors)}, n {found.count}"


def _mean(lines: Lines, *keys: str) -> float:
    """Mean of what stands at `keys` in the lines; 0 where it is not there."""
    found = []
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key, 0) if isinstance(value, Mapping) else 0
        found.append(float(value))
    return sum(found) / len(found)


def _introduction(experiment: Experiment, lines: Lines, timed: Lines, total: int, name: str) -> str:
    labels = {
        short_name(task): " and ".join(TASK_LABELS.get(metric, metric) for metric in task.measured)
        for task in experiment.tasks
    }
    told = "; ".join(f"{task}: {metrics}" for task, metrics in labels.items())
    machines = "; ".join(dict.fromkeys(_machine(line["environment"]) for line in lines))
    latencies = "; ".join(dict.fromkeys(_machine(line["environment"]) for line in timed))
    return (
        f"{len(lines)} of {total} cells. Score of a task is the mean of its metrics ({told}).\n"
        f"Seeds {', '.join(map(str, experiment.seeds))}; all methods have the same teacher, rows, batches and steps.\n"
        f"\nTaught on: {machines}.\n"
        + (f"\nLatencies are of: {latencies}.\n" if latencies else "")
        + f"\n```text\nmakd compare {shlex.quote(name)}\n```"
    )


def _machine(environment: Mapping[str, Any]) -> str:
    versions = environment["versions"]
    told = ", ".join(f"{package} {versions[package]}" for package in ("torch", "transformers", "makd"))
    return f"{environment['device_name']}, threads: {environment['threads']}, {told}"


def _curves(experiment: Experiment, lines: Lines) -> dict[str, list[tuple[float, float]]]:
    """Method -> (parameters, average) of each budget, as shares of the teacher's; empty with fewer than two budgets."""
    tasks = [short_name(task) for task in experiment.tasks]
    found: dict[str, list[tuple[float, float]]] = {}
    for budget in map(budget_name, experiment.budgets):
        own = [line for line in lines if line["cell"]["budget"] == budget]
        teacher = scores(own, lambda line: float(line["teacher"]["score"]))
        for name, values in _by_method(experiment, own).items():
            share = _share(values, teacher, tasks)
            if share is not None:
                theirs = [line for line in own if line["cell"]["method"] == name]
                size = _mean(theirs, "params", "student", "total") / _mean(theirs, "params", "teacher", "total")
                found.setdefault(name, []).append((size, share))
    return found if max(map(len, found.values()), default=0) > 1 else {}


def _settings_table(experiment: Experiment, lines: Lines) -> str:
    """Hyper-parameters as they were used; those of tasks and budgets that differ stand beside each other."""
    rows = []
    for method in experiment.methods:
        own = [line for line in lines if line["cell"]["method"] == method.name]
        told = {
            key: ", ".join(dict.fromkeys(str(line["settings"][key]) for line in own)) for key in own[0]["settings"]
        } if own else {}  # fmt: skip
        if told:
            steps = [] if method.times_steps == 1 else [f"{method.times_steps} times the steps"]
            rows.append([f"`{method.name}`", "; ".join([*steps, *(f"{key} {value}" for key, value in told.items())])])
    return _markdown(["", "settings"], rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))
