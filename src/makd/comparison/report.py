"""Station 10: a comparison as an HTML page: the frontier with standard errors, paired differences, all tables."""

from pathlib import Path
from statistics import mean as plain_mean
from typing import Any

from makd.comparison.all_results import ComparisonResults, budget_tables, introduction, read_results
from makd.comparison.settings import Experiment, budget_name, short_name
from makd.comparison.statistics import average, difference, pairs, scores
from makd.comparison.tables import mean_of, scores_by_method, settings_table, share_of_teacher
from makd.report import charts
from makd.report.elements import Markup, element, section, table
from makd.report.page import check_extra, short_name_of, whole_page
from makd.report.target import check_target, write_target
from makd.run_folder.text_table import TextTable
from makd.shell import command

Point = dict[str, Any]
"""A method at a budget: its names, costs and scores."""


def write_comparison_report(experiment: Experiment, path: str | Path, name: str = "experiment.yaml") -> Path:
    """Write what is known of `experiment` to `path`, as one HTML file.

    Args:
        experiment: its output folder has the results; cells that were not run are left open.
        path: of the page; an older report is replaced, another file is not.
        name: of the experiment's file.

    Raises:
        OutputError: no cell was run with these settings; or the page cannot be written, or would replace what is none.
        SettingError: the charts' library is not installed.
    """
    path = Path(path).expanduser()
    check_extra()
    check_target(path, overwrite=True)
    results = read_results(experiment, name)
    points = _points(experiment, results)
    parts = [
        ("glance", "At a glance", _glance(experiment, results, points)),
        ("frontier", "Frontier", _frontier(points)),
        ("differences", "Differences", _differences(experiment, results)),
    ]
    for at, (budget, tables) in enumerate(budget_tables(experiment, results), start=1):
        parts.append(
            (
                f"budget-{at}",
                budget,
                section(
                    f"budget-{at}",
                    budget,
                    [_table(one, f"Table {number} at {budget}") for number, one in enumerate(tables, start=1)],
                ),
            )
        )
    settings = _table(settings_table(experiment, results.lines), "Settings")
    parts.append(("settings", "Settings", section("settings", "Settings of the methods", settings)))
    title = f"{Path(name).stem}: students of {short_name_of(experiment.teacher)}"
    text = whole_page(title, element("code", experiment.teacher), parts, command("compare", name, report=path))
    write_target(path, text)
    return path


def _points(experiment: Experiment, results: ComparisonResults) -> list[Point]:
    """Every method at every budget that has all tasks."""
    tasks, found = [short_name(task) for task in experiment.subjects], []
    for budget in experiment.budgets:
        lines = results.lines_of(budget)
        timed = results.timed_of(experiment, budget)
        teacher = scores(lines, lambda line: float(line["teacher"]["score"]))
        for method, values in scores_by_method(experiment, lines).items():
            share, score = share_of_teacher(values, teacher, tasks), average(values, tasks)
            theirs = average({key: teacher[key] for key in values}, tasks)
            if share is None or score is None or theirs is None:
                continue
            own = [line for line in lines if line["cell"]["method"] == method]
            size = mean_of(own, "params", "student", "total") / mean_of(own, "params", "teacher", "total")
            latency = None if method not in timed else timed[method]["latency_ms"]
            ratios = [] if latency is None else [one["student"] / one["teacher"] for one in latency.values()]
            found.append({
                "method": method, "budget": budget_name(budget), "size": size, "quality": 100 * share,
                "error": None if score.error is None else 100 * score.error / theirs.value, "seeds": score.count,
                "time": plain_mean(ratios) if ratios else None,
            })  # fmt: skip
    return found


def _glance(experiment: Experiment, results: ComparisonResults, points: list[Point]) -> Markup:
    told = [element("p", text) for text in introduction(experiment, results).split("\n\n")]
    tiles = []
    for budget in dict.fromkeys(point["budget"] for point in points):
        own = _ranked([point for point in points if point["budget"] == budget])
        best, second = own[0], own[1] if len(own) > 1 else None
        error = f"SE over seeds {best['error']:.1f}" if best["error"] is not None else "of one seed, without an SE"
        besides = "" if second is None else f"; then {second['method']} with {second['quality']:.1f}%"
        tiles.append(element(
            "div", element("h3", f"Best at {budget}"), element("p", best["method"], class_="answer"),
            element("p", f"{best['quality']:.1f}% of the teacher's average, {error}{besides}"),
            class_="tile",
        ))  # fmt: skip
    return section("glance", "At a glance", element("div", tiles, class_="tiles"), told)


def _ranked(points: list[Point]) -> list[Point]:
    """The best first, of those that have as many seeds as any: one lucky seed is no best method."""
    most = max(point["seeds"] for point in points)
    return sorted((point for point in points if point["seeds"] == most), key=lambda point: -float(point["quality"]))


def _frontier(points: list[Point]) -> Markup:
    figures = []
    for key, title, across in (("size", "Quality against size", "parameters, of the teacher's"),
                               ("time", "Quality against latency", "time of a forward, of the teacher's")):  # fmt: skip
        measured = [point for point in points if point[key] is not None]
        if not measured:
            continue
        best = _ranked(measured)[0]
        told = (
            f"Average score, in per cent of the teacher's; bars are standard errors over seeds. Best: {best['method']}"
        )
        spec = charts.frontier(measured, (key, across), ("quality", "average, % of the teacher's"), "method", "error")
        rows = [
            [point["method"], point["budget"], point[key], point["quality"], point["error"], point["seeds"]]
            for point in measured
        ]
        head = ["method", "budget", across, "% of the teacher's", "standard error", "seeds"]
        figures.append(charts.figure(title, told, spec, head, rows, 2))
    return section("frontier", "Quality, size and latency", element("div", figures, class_="beside"))


def _differences(experiment: Experiment, results: ComparisonResults) -> Markup:
    """What the first method has more than each other one, paired over tasks and seeds."""
    first, figures = experiment.methods[0].name, []
    for budget in experiment.budgets:
        by_method = scores_by_method(experiment, results.lines_of(budget))
        rows: list[Point] = []
        for method, theirs in by_method.items():
            gains = pairs(by_method.get(first, {}), theirs)
            found = difference({key: 100 * gain for key, gain in gains.items()})
            if method != first and found is not None:
                errors = [None if one is None else one.error for one in (found.over_seeds, found.over_tasks)]
                rows.append(
                    {**charts.difference(method, found.mean, errors[0]), "tasks": errors[1], "pairs": len(gains)}
                )
        if not rows:
            continue
        rows.sort(key=lambda row: -float(row["gain"]))
        known_errors = [row for row in rows if row["error"] is not None]
        clear = sum(row["low"] > 0 for row in known_errors)
        told = (
            f"{first} minus each other method, in points of 100 times the score, at {budget_name(budget)}: mean over "
            "tasks, and its standard error over seeds. "
        ) + (
            f"More than one standard error above zero: {clear} of {len(known_errors)}"
            if known_errors
            else "One seed has no standard error: nothing of this can be told from chance"
        )
        cells = [[row["name"], row["gain"], row["error"], row["tasks"], row["pairs"]] for row in rows]
        head = ["method", f"{first} minus it", "standard error over seeds", "over tasks", "pairs"]
        spec = charts.differences(rows, "points", "+.2f")
        figures.append(charts.figure(f"Paired differences at {budget_name(budget)}", told, spec, head, cells))
    if not figures:
        return section("differences", "Paired differences", element("p", "No two methods share a cell yet."))
    return section("differences", "Paired differences", element("div", figures, class_="beside"))


def _table(one: TextTable, caption: str) -> Markup:
    head = [_plain(cell) or "method" for cell in one.columns]
    rows = [[_plain(cell) for cell in row] for row in one.rows]
    return element("div", table(head, rows, caption, one.left), element("p", one.note) if one.note else None)


def _plain(cell: str) -> str:
    """A cell without the marks of markdown."""
    return cell.replace("`", "").strip("*")
