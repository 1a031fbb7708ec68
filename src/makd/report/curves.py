"""The sections of a run's report that are charts: spectra, layers, training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from makd.report import charts
from makd.report.charts import AFTER, BEFORE
from makd.report.elements import Markup, element, missing, section
from makd.report.glance import role_name
from makd.report.record import Record
from makd.report.words import number, share
from makd.run_files import LAYERS, LINEARS, SPECTRA, TRAINING

ASPECTS = {
    "loss": "all aspects together, weighted",
    "matrix": "outputs of the linears",
    "experts": "outputs of mixtures of experts",
    "hidden": "hidden states",
    "attention": "attention distributions",
    "embedding": "text embeddings",
    "similarity": "similarities between texts",
    "logits": "predictions",
    "task": "labels",
    "relation": "relations between tokens",
}
"""Aspect, as it is logged -> what it compares."""
LOGGED = 400
"""Steps of a curve, at most."""


def moments(record: Record) -> dict[str, str]:
    """What was measured when, as files call it -> for a reader; a student that was not taught is as it was made."""
    return {"before": BEFORE, "after": AFTER} if record.is_trained else {"after": "student"}


def spectra(record: Record) -> Markup:
    """What each rank is predicted to lose, a chart a role."""
    found, linears = record.of(SPECTRA), {row["name"]: row for row in record.of(LINEARS).get("linears", [])}
    if "missing" in found:
        return section(record.key("spectra"), "Spectra and ranks", missing(found["missing"], found.get("how")))
    # of embeddings and head, which are no rows of linears: those that have factors
    vocabulary = {one["name"]: one["rank"] for one in record.of(LINEARS).get("vocabulary", [])}
    by_role: dict[str, list[_Curve]] = {}
    for curve in found["curves"]:
        rows = [linears[name] for name in curve["name"].split(" + ") if name in linears]
        roles = [role for row in rows for role in row["roles"]] or ["vocabulary"]
        by_role.setdefault(" + ".join(roles) + (" as one" if len(rows) > 1 else ""), []).append(
            _Curve(curve, rows[0]["layer"] if rows else 0, rows[0]["rank"] if rows else vocabulary.get(curve["name"]))
        )
    layers = 1 + max((row["layer"] for row in linears.values()), default=0)
    figures = [_role_figure(role, curves, layers) for role, curves in by_role.items()]
    told = (
        "What is predicted to be lost of each linear, by how many terms of its decomposition are kept, in the norm "
        "that the solver works in. A curve that falls late needs many ranks. Points: the ranks that were chosen. "
        "Colour: "
        "depth, from the first layer to the last."
    )
    scale = element(
        "p",
        element("span", "first layer"),
        element("span", class_="ramp", aria_hidden="true"),
        element("span", "last layer"),
        class_="scale",
    )
    return section(
        record.key("spectra"), "Spectra and ranks", element("p", told), scale, element("div", figures, class_="grid")
    )


@dataclass(frozen=True)
class _Curve:
    """What was predicted to be lost of one linear, or of several as one."""

    found: Mapping[str, Any]
    """As `spectra.json` has it."""
    layer: int
    rank: int | None
    """None where it stayed dense."""


def _role_figure(role: str, curves: list[_Curve], layers: int) -> Markup:
    data, chosen, cells = [], [], []
    for one in curves:
        curve, layer, rank = one.found, one.layer, one.rank
        place = {"linear": curve["name"], "layer": layer}
        data += [
            {**place, "rank": at, "value": error} for at, error in zip(curve["ranks"], curve["errors"], strict=True)
        ]
        lost = dict(zip(curve["ranks"], curve["errors"], strict=True)).get(rank)
        if lost is not None:
            chosen.append({**place, "rank": rank, "value": lost})
        half = next((at for at, error in zip(curve["ranks"], curve["errors"], strict=True) if error <= 0.5), None)
        cells.append(
            [
                curve["name"],
                layer,
                rank if rank is not None else "dense",
                curve["terms"],
                half if half is not None else "-",
                number(lost),
            ]
        )
    ranks = [one["rank"] for one in chosen]
    span = f"ranks {min(ranks)} to {max(ranks)}" if len({*ranks}) > 1 else f"rank {ranks[0]}" if ranks else ""
    told = span or "all stayed dense"
    if chosen:
        most = max(chosen, key=lambda one: one["value"])
        told += f"; most is lost in layer {most['layer']}, {share(most['value'])}"
    named = role_name(role.split(" + "))
    title = f"{role}: {named}" if "as one" not in role and named != role else role
    head = ["linear", "layer", "rank", "terms", "rank at which half is lost", "lost at its rank"]
    return charts.figure(title, told, charts.spectrum(data, chosen, layers, "predicted loss"), head, cells)


def layers(record: Record) -> Markup:
    """How far each layer is from the teacher's, before and after the training."""
    found = record.of(LAYERS)
    if "missing" in found:
        return section(record.key("layers"), "Layer by layer", missing(found["missing"], found.get("how")))
    measures = {
        "hidden_error": ("Hidden states", "relative error of what leaves the layer: 0 is a copy, 1 a constant"),
        "attention_kl": ("Attention", "how differently tokens look at each other, in nats"),
        "cross_attention_kl": ("Cross-attention", "how differently tokens look at the input, in nats"),
        "hidden_cosine": (
            "Direction of hidden states",
            "mean cosine between the student's and the teacher's: 1 is a copy",
        ),
    }
    told_as = moments(record)
    times = [when for when in told_as if when in found]
    figures = []
    for key, (title, unit) in measures.items():
        data = [
            {"layer": layer["layer"], "value": layer[key], "when": told_as[when]}
            for when in times
            for layer in found[when]["layers"]
            if key in layer
        ]
        if not data:
            continue
        last = [row for row in data if row["when"] == told_as[times[-1]]]
        worst = (min if key == "hidden_cosine" else max)(last, key=lambda row: row["value"])
        told = f"{unit}. Worst: layer {worst['layer']}, {number(worst['value'])}"
        by = "when" if len(times) > 1 else None
        spec = charts.lines(
            data, ("layer", "layer"), ("value", title.lower()), by, order=[told_as[when] for when in times]
        )
        if key == "hidden_cosine":
            spec["encoding"]["y"]["scale"] = {"zero": False}
        numbers = [
            [
                index,
                *(
                    next((row["value"] for row in data if row["layer"] == index and row["when"] == told_as[when]), None)
                    for when in times
                ),
            ]
            for index in dict.fromkeys(row["layer"] for row in data)
        ]
        figures.append(charts.figure(title, told, spec, ["layer", *(told_as[when] for when in times)], numbers))
    shown = found[times[-1]]
    told = (
        f"Measured on {shown['rows']} held-out rows ({shown['tokens']:,} tokens), each layer with what the student's "
        "layers before it gave."
    )
    return section(
        record.key("layers"),
        "Layer by layer",
        element("p", told),
        element("div", figures, class_="grid"),
        *_missing_aspects(shown),
        *_roles(record),
    )


def _missing_aspects(shown: Mapping[str, Any]) -> list[Markup]:
    return [missing(f"{aspect}: {why}") for aspect, why in shown["missing"].items()]


def _roles(record: Record) -> list[Markup]:
    """Errors of linears before and after, as means of roles."""
    told_as = moments(record)
    rows = record.of(LINEARS).get("linears", [])
    data, cells = [], []
    for role in dict.fromkeys(" ".join(row["roles"]) for row in rows):
        means = {}
        for when in told_as:
            found = [
                row["measured_error"][when]
                for row in rows
                if " ".join(row["roles"]) == role and row["measured_error"].get(when) is not None
            ]
            if found:
                means[when] = sum(found) / len(found)
                data.append({"role": role, "value": means[when], "when": told_as[when]})
        cells.append([role, *(means.get(when) for when in told_as)])
    if not data:
        return []
    times = [name for name in told_as.values() if any(row["when"] == name for row in data)]
    colours = {"domain": times, "range": [charts.COLOURS[0], charts.COLOURS[1]][: len(times)]}
    spec = {
        "data": {"values": data},
        "mark": {"type": "bar", "aria": False},
        "encoding": {
            "x": {"field": "role", "type": "nominal", "title": None, "sort": None, "axis": {"labelAngle": 0}},
            "xOffset": {"field": "when", "sort": times},
            "y": {"field": "value", "type": "quantitative", "title": "relative error", "axis": {"format": "%"}},
            "color": {"field": "when", "type": "nominal", "scale": colours, "legend": {"orient": "top", "title": None}},
            "tooltip": [{"field": "role"}, {"field": "when"}, {"field": "value", "format": ".3~g", "title": "error"}],
        },
    }
    last = [row for row in data if row["when"] == times[-1]]
    worst = max(last, key=lambda row: row["value"])
    told = f"measured error of the linears, a mean over layers. Worst: {worst['role']}, {share(worst['value'])}"
    return [charts.figure("Linears by role", told, spec, ["role", *told_as.values()], cells)]


def training(record: Record) -> Markup:
    """The loss of each aspect, step by step."""
    found = record.of(TRAINING)
    if "missing" in found:
        how = found.get("how", "`makd distill` trains it.")
        return section(record.key("training"), "Training", missing(found["missing"], how))
    parts: list[Markup] = []
    for at, one in enumerate(found["trainings"], start=1):
        if len(found["trainings"]) > 1:
            parts.append(element("h3", f"Training {at}"))
        parts.append(element("div", _losses(one), class_="grid"))
    return section(
        record.key("training"),
        "Training",
        element("p", "Mean losses between two lines of the log. Aspects are shown without their weights."),
        *parts,
    )


def _losses(one: Mapping[str, Any]) -> list[Markup]:
    log = one["log"]
    names = ["loss", *one["weights"]]
    figures = []
    for name in names:
        points = [(entry["step"], entry[name], "training") for entry in log if isinstance(entry.get(name), float | int)]
        points += [
            (entry["step"], entry[f"eval_{name}"], "held-out")
            for entry in log
            if isinstance(entry.get(f"eval_{name}"), float | int)
        ]
        every = max(1, len(points) // LOGGED)
        points = points[::every]
        if not points:
            continue
        own = [value for _, value, kind in points if kind == "training"] or [value for _, value, _ in points]
        kind = name.rstrip("0123456789").rstrip("_")
        weight = one["weights"].get(name)
        told = ASPECTS.get(kind, "an aspect of the plan") + ("" if weight is None else f", weight {weight:g}")
        told += f". From {number(own[0])} to {number(own[-1])}"
        data = [{"step": step, "value": value, "on": on} for step, value, on in points]
        kinds = list(dict.fromkeys(row["on"] for row in data))
        spec = charts.lines(
            data, ("step", "step"), ("value", name), "on" if len(kinds) > 1 else None, points=len(points) < 60
        )
        figures.append(
            charts.figure(
                name, told, spec, ["step", name, "on"], [[row["step"], row["value"], row["on"]] for row in data]
            )
        )
    return figures
