"""Several runs in one report: quality against size and against latency, and a table beside each other."""

from collections.abc import Sequence
from typing import Any

from makd.measures import rows
from makd.report import charts
from makd.report.elements import Markup, element, missing, section, table
from makd.report.glance import Quality, latency_ratios, quality_of
from makd.report.record import Record
from makd.report.words import score, share


def names_of(records: Sequence[Record]) -> list[str]:
    """What each run is called, none like another: by its folder, with what is above it where that is not enough."""
    for parts in range(1, 12):
        names = ["/".join(record.folder.resolve().parts[-parts:]) for record in records]
        if len({*names}) == len(names):
            return names
    return [f"{number}. {record.name}" for number, record in enumerate(records, start=1)]


def frontier(records: Sequence[Record]) -> Markup:
    """Quality against size, and against latency, a point a run."""
    names, qualities = names_of(records), [quality_of(record.metrics) for record in records]
    labels = list(dict.fromkeys(quality.label for quality in qualities if quality is not None))
    teachers = {record.teacher for record in records}
    parts: list[Markup] = []
    if len(teachers) > 1:
        parts.append(
            missing(f"These runs have {len(teachers)} teachers: their qualities are not to be compared as they stand")
        )
    if not labels:
        parts.append(missing("no quality was measured in these runs"))
    for label in labels:
        known = [
            (name, record, quality)
            for name, record, quality in zip(names, records, qualities, strict=True)
            if quality is not None and quality.label == label
        ]
        is_alike = len({_rows_of(record, quality) for _, record, quality in known}) == 1
        if not is_alike:
            parts.append(
                missing(
                    f"The {label} of these runs was measured on different rows, or they do not say that the rows are "
                    "the same: it is not to be compared as it stands"
                )
            )
        data: list[dict[str, Any]] = []
        for name, record, quality in known:
            counts = record.metrics["params"]["total"]
            ratios = latency_ratios(record.metrics)
            data.append(
                {
                    "run": name,
                    "quality": quality.student,
                    "size": counts["student"] / counts["teacher"],
                    "time": ratios.get("batch16", ratios.get("batch1")),
                }
            )
        figures = []
        for key, title, across in (
            ("size", "Quality against size", "parameters, of the teacher's"),
            ("time", "Quality against latency", "time of a forward, of the teacher's"),
        ):
            points = [row for row in data if row[key] is not None]
            if not points:
                continue
            direction = "higher is better" if known[0][2].higher_is_better else "lower is better"
            best = (max if known[0][2].higher_is_better else min)(points, key=lambda row: row["quality"])
            told = f"{label}: {direction}; further left is cheaper."
            if is_alike and len(teachers) == 1:
                told += f" Best quality: {best['run']}, {score(best['quality'])}"
            spec = charts.frontier(points, (key, across), ("quality", label), "run")
            figures.append(
                charts.figure(
                    title,
                    told,
                    spec,
                    ["run", across, label],
                    [[row["run"], row[key], row["quality"]] for row in points],
                )
            )
        parts.append(element("div", figures, class_="beside"))
    return section("frontier", "Quality, size and latency", *parts, side_by_side(records))


def _rows_of(record: Record, quality: Quality) -> str:
    """What tells the rows that a run was measured on from others."""
    digest = record.metrics.get("measured_on", {}).get(quality.rows)
    if digest is not None:
        return str(digest)
    # an older makd kept no digest: what the recipe says of the rows, and what the teacher has on them
    recipe = record.recipe
    source = recipe.get("task") or recipe.get("data")
    count = ((recipe.get("recipe") or {}).get("evaluation") or {}).get("rows") if quality.rows == "held_out" else None
    return repr((source, count, None if quality.teacher is None else f"{quality.teacher:.3g}"))


def side_by_side(records: Sequence[Record]) -> Markup:
    """Every measurement of every run."""
    names, found = (
        names_of(records),
        [{name.strip(): student for name, _, _, student in rows(record.metrics)} for record in records],
    )
    labels = list(dict.fromkeys(label for one in found for label in one))
    lines = [[label, *(one.get(label, "-") for one in found)] for label in labels]
    lines.insert(0, ["teacher", *(record.teacher for record in records)])
    lines.insert(
        1,
        [
            "parameters kept",
            *(
                share(record.metrics["params"]["total"]["student"] / record.metrics["params"]["total"]["teacher"])
                for record in records
            ),
        ],
    )
    return table(["measure", *names], lines, "The students beside each other", 1)
