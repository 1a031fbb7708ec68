"""Station 10: the tables of a comparison's page: scores and what they differ by, costs, settings."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from makd.comparison.settings import OURS, Experiment, short_name
from makd.comparison.statistics import Mean, Scores, average, difference, mean, pairs, scores
from makd.run_folder.text_table import TextTable

Lines = Sequence[Mapping[str, Any]]

PARTS = ("total", "linears")
SPENT = (("steps",), ("tokens",), ("seconds", "total"))


def quality_table(experiment: Experiment, lines: Lines) -> TextTable:
    """Scores of one budget: a row for each method, for the teacher and for the majority class."""
    tasks = [short_name(task) for task in experiment.subjects]
    by_method = scores_by_method(experiment, lines)
    teacher = scores(lines, lambda line: float(line["teacher"]["score"]))
    majority = scores(lines, lambda line: line["majority"])
    reference, told_reference = _reference(experiment, by_method, tasks)
    theirs: Scores = {} if reference is None else by_method.get(reference, {})
    head = ["", *tasks, "average", "of the teacher's", f"difference to {told_reference}"]
    rows = [_row("*teacher*", teacher, tasks, teacher), _row("*majority class*", majority, tasks, teacher)]
    rows = [[*row, ""] for row in rows]
    for name, found in by_method.items():
        told = told_reference if name == reference else _difference(pairs(found, theirs))
        rows.append([*_row(f"`{name}`", found, tasks, teacher), told])
    note = (
        "100 x the task's score, mean ± standard error over seeds. The average is over tasks, of seeds that have all. "
        "Differences are paired over task and seed and averaged over tasks, in 100 x the score and in standard errors "
        "(SE) with p of a two-sided t-test: over seeds, which asks about these very tasks, and over tasks, which asks "
        "about others like these."
    )
    return TextTable(head, rows, note)


def lead_table(experiment: Experiment, lines: Lines) -> TextTable | None:
    """What the first row has more than each other one at one budget, over the cells that both have.

    None where no two rows share a cell, or all are ours: the table of scores compares with the first row then.
    """
    if _only_ours(experiment):
        return None
    tasks = [short_name(task) for task in experiment.subjects]
    by_method = scores_by_method(experiment, lines)
    first = experiment.methods[0].name
    rows = []
    for name, theirs in by_method.items():
        gains = pairs(by_method.get(first, {}), theirs)
        if name != first and gains:
            rows.append([f"`{name}`", *_by_task(gains, tasks), _difference(gains)])
    return TextTable([f"`{first}` minus", *tasks, "all"], rows) if rows else None


def cost_table(experiment: Experiment, lines: Lines, timed: Mapping[str, Mapping[str, Any]]) -> TextTable:
    """What each method cost at one budget: means over its cells.

    Args:
        experiment: whose methods are the rows.
        lines: cells of the budget.
        timed: what each method's student takes for a forward, by the method's name, and the teacher beside it; the
            teacher's own row has the median of them. There are no such columns where nothing was timed.
    """
    batches = [name.removeprefix("batch") for line in list(timed.values())[:1] for name in line["latency_ms"]]
    rows = []
    for method in experiment.methods:
        own = [line for line in lines if line["cell"]["method"] == method.name]
        if own:
            costs = [mean_of(own, *keys) for keys in (*(("params", "student", part) for part in PARTS), *SPENT)]
            told = [f"{value:,.0f}" for value in costs]
            rows.append([f"`{method.name}`", *told, *_latencies(timed.get(method.name), len(batches))])
    teacher = [f"{mean_of(lines, 'params', 'teacher', part):,.0f}" for part in PARTS]
    beside = zip(*([found["teacher"] for found in line["latency_ms"].values()] for line in timed.values()), strict=True)
    rows.insert(0, ["*teacher*", *teacher, *("" for _ in SPENT), *(f"{median(taken):.1f}" for taken in beside)])
    head = ["", "parameters", "of the linears", "steps", "tokens", "seconds"]
    return TextTable([*head, *(f"ms, batch {batch}" for batch in batches)], rows)


def settings_table(experiment: Experiment, lines: Lines) -> TextTable:
    """Hyper-parameters as they were used; those of tasks and budgets that differ stand beside each other."""
    rows = []
    for method in experiment.methods:
        own = [line for line in lines if line["cell"]["method"] == method.name]
        if own:
            used = {key: dict.fromkeys(str(line["settings"][key]) for line in own) for key in own[0]["settings"]}
            told = [f"{key} {', '.join(values)}" for key, values in used.items() if [*values] != [str(None)]]
            rows.append([f"`{method.name}`", "; ".join([*_told_steps(method.times_steps), *told])])
    return TextTable(["", "settings"], rows, left=2)


def _told_steps(times: float) -> list[str]:
    if times == 0:
        return ["not taught"]
    return [] if times == 1 else [f"{times} times the steps"]


def best_baseline(experiment: Experiment, by_method: Mapping[str, Scores], tasks: Sequence[str]) -> str | None:
    """Name of the row with the highest average of those that are no methods of ours; None if none has all tasks.

    Only rows that have as many seeds as any of them: one lucky seed is no best row.
    """
    others = [method.name for method in experiment.methods if method.kind not in OURS]
    averages = {name: average(by_method[name], tasks) for name in others if name in by_method}
    known = {name: found for name, found in averages.items() if found is not None}
    most = max((found.count for found in known.values()), default=0)
    whole = {name: found.value for name, found in known.items() if found.count == most}
    return max(whole, key=whole.__getitem__) if whole else None


def scores_by_method(experiment: Experiment, lines: Lines) -> dict[str, Scores]:
    """Scores of each method that has any, in the order of the rows."""
    found: dict[str, Scores] = {}
    for method in experiment.methods:
        own = scores((line for line in lines if line["cell"]["method"] == method.name), lambda line: line["score"])
        if own:
            found[method.name] = own
    return found


def share_of_teacher(found: Scores, teacher: Scores, tasks: Sequence[str]) -> float | None:
    """Share of the teacher's average, over the seeds of `found`."""
    own, theirs = average(found, tasks), average({key: teacher[key] for key in found}, tasks)
    return None if own is None or theirs is None or theirs.value <= 0 else own.value / theirs.value


def mean_of(lines: Lines, *keys: str) -> float:
    """Mean of what stands at `keys` in the lines; 0 where it is not there."""
    found = []
    for line in lines:
        value: Any = line
        for key in keys:
            value = value.get(key, 0) if isinstance(value, Mapping) else 0
        found.append(float(value))
    return sum(found) / len(found)


def _reference(experiment: Experiment, by_method: Mapping[str, Scores], tasks: Sequence[str]) -> tuple[str | None, str]:
    """Name of the row that others are compared with, and how to say it. Without baselines it is the first row."""
    if _only_ours(experiment):
        first = experiment.methods[0].name
        return first, f"`{first}`"
    return best_baseline(experiment, by_method, tasks), "the best baseline"


def _only_ours(experiment: Experiment) -> bool:
    """Whether all rows are makd's, as in an ablation, which has no baselines."""
    return all(method.kind in OURS for method in experiment.methods)


def _latencies(line: Mapping[str, Any] | None, columns: int) -> list[str]:
    """A student's milliseconds, and those of the teacher that took turns with it as the unit."""
    if line is None:
        return [""] * columns
    return [
        f"{taken['student']:.1f} ({taken['student'] / taken['teacher']:.2f}x)" for taken in line["latency_ms"].values()
    ]


def _row(name: str, found: Scores, tasks: Sequence[str], teacher: Scores) -> list[str]:
    share = share_of_teacher(found, teacher, tasks)
    told = "" if share is None else f"{100 * share:.1f} %"
    return [name, *_by_task(found, tasks), _text(average(found, tasks)), told]


def _by_task(found: Scores, tasks: Sequence[str]) -> list[str]:
    return [_text(mean(value for (task, _), value in found.items() if task == wanted)) for wanted in tasks]


def _text(found: Mean | None) -> str:
    if found is None:
        return ""
    error = "" if found.error is None else f" ± {100 * found.error:.2f}"
    return f"{100 * found.value:.2f}{error}"


def _difference(gains: Scores) -> str:
    found = difference(gains)
    if found is None:
        return ""
    errors = found.text()
    return f"{100 * found.mean:+.2f}{' = ' if errors else ''}{errors}, n {len(gains)}"
