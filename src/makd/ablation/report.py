"""Station 10: an ablation as an HTML page: what is missed when an aspect is off, what that aspect costs, the table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from makd.ablation.measured import Line, Measure, by_variation, measures_of, seconds_of
from makd.ablation.run import Ablation
from makd.ablation.table import ablation_table
from makd.ablation.variations import OFF, WHOLE
from makd.report import charts
from makd.report.elements import Markup, element, section, table
from makd.report.page import check_extra, whole_page
from makd.report.target import check_target, write_target
from makd.shell import command

CLEAR = 0.05
"""p of the paired t-test below which a difference is called one."""


def write_ablation_report(found: Ablation, path: str | Path, name: str = "run.yaml") -> Path:
    """Write what an ablation found to `path`, as one HTML file.

    Args:
        found: by `ablate`.
        path: of the page; an older report is replaced, another file is not.
        name: of the run's file.

    Raises:
        OutputError: the page cannot be written, or would replace what is none.
        SettingError: the charts' library is not installed.
    """
    path = Path(path).expanduser()
    check_extra()
    check_target(path, overwrite=True)
    seeds = dict.fromkeys(int(line["seed"]) for line in found.lines)
    rows = ablation_table(found.lines)
    parts = [
        ("glance", "At a glance", _glance(found.lines, len(seeds))),
        ("differences", "Differences", _differences(found.lines)),
        ("table", "Table", section(
            "table", "What each variation measures",
            table(list(rows.columns), [list(row) for row in rows.rows], "Means and standard errors over seeds"),
        )),
    ]  # fmt: skip
    text = whole_page(
        f"What each aspect brings: {Path(name).name}",
        element("span", f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}, a start each, equal steps"),
        parts,
        command("ablate", name, output=found.folder, report=path),
    )
    write_target(path, text)
    return path


def _glance(lines: Sequence[Line], seeds: int) -> Markup:
    """The answers: what training brought at all, which aspects are missed, which are not."""
    decides, variations = measures_of(lines[0]["metrics"])[0], by_variation(lines)
    before, after = (decides.mean(variations[WHOLE], when) for when in ("before", "after"))
    tiles = []
    if before is not None and after is not None:
        tiles.append(_tile(f"{decides.label}, {WHOLE}", decides.text(after), f"{decides.text(before)} untaught"))
    if seeds == 1:
        told = "One seed has no standard error: nothing of this can be told from chance. Give --seeds more."
        return section("glance", "At a glance", element("div", tiles, class_="tiles"), element("p", told))
    clear = _clear(decides, variations)
    for title, wanted in (("Missed when it is off", True), ("Better when it is off", False)):
        names = [name for name, is_missed in clear.items() if is_missed is wanted]
        tiles.append(_tile(title, ", ".join(names) or "none", f"p below {CLEAR}"))
    told = (
        f"Each aspect is off once, in a training of equal steps from the same start; {decides.towards} "
        f"{decides.label} is better. Differences are paired over {seeds} seeds; what a t-test cannot tell from chance "
        f"(p of {CLEAR} or more) was not seen: more seeds see more."
    )
    return section("glance", "At a glance", element("div", tiles, class_="tiles"), element("p", told))


def _clear(decides: Measure, variations: dict[str, list[Line]]) -> dict[str, bool]:
    """Whether the whole plan is better than one without it, of those aspects of which it can be told."""
    found: dict[str, bool] = {}
    for name, own in variations.items():
        gain = decides.gain(variations[WHOLE], own) if name.startswith(OFF) else None
        if gain is not None and gain.over_seeds is not None and gain.over_seeds.probability < CLEAR:
            found[name.removeprefix(OFF)] = (gain.mean > 0) is (decides.towards == "more")
    return found


def _tile(title: str, answer: str, told: str) -> Markup:
    return element(
        "div", element("h3", title), element("p", answer, class_="answer"), element("p", told), class_="tile"
    )


def _differences(lines: Sequence[Line]) -> Markup:
    """A figure of each measure, and one of time."""
    variations = by_variation(lines)
    others = {name: own for name, own in variations.items() if name != WHOLE}
    figures = []
    for measure in measures_of(lines[0]["metrics"]):
        found = {name: measure.gain(own, variations[WHOLE]) for name, own in others.items()}
        rows: list[dict[str, Any]] = []
        for name, gain in found.items():
            if gain is not None:
                error = None if gain.over_seeds is None else gain.over_seeds.error
                rows.append(charts.difference(name, gain.mean, error))
        told = (
            f"Minus that of the {WHOLE}, mean and standard error of differences paired over seeds; "
            f"{measure.towards} is better"
        )
        cells = [[row["name"], row["gain"], row["error"]] for row in rows]
        spec = charts.differences(rows, "difference", ".4~f")
        figures.append(charts.figure(measure.label, told, spec, ["variation", "difference", "standard error"], cells))
    figures.append(_times(variations))
    return section("differences", f"Each variation beside the {WHOLE}", element("div", figures, class_="beside"))


def _times(variations: dict[str, list[Line]]) -> Markup:
    """What each variation's training takes."""
    taken = {name: seconds_of(own) for name, own in variations.items()}
    whole = taken[WHOLE]
    times = [
        {"name": name, "seconds": mean.value, "share": mean.value / whole.value}
        for name, mean in taken.items()
        if mean is not None and whole is not None and whole.value > 0
    ]
    spec = charts.bars(times, "name", "share", f"of the {WHOLE}'s")
    cells = [[row["name"], row["seconds"], row["share"]] for row in times]
    told = f"Time of training, mean over seeds, as a share of that of the {WHOLE}"
    return charts.figure("What it costs", told, spec, ["variation", "seconds", f"of the {WHOLE}"], cells)
