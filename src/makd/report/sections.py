"""The sections of a run's report that are made of tables and texts: quality, the map, samples, warnings, recipe."""

from collections.abc import Mapping
from typing import Any

from makd.measures import table_of
from makd.plain_yaml import dump_yaml
from makd.report import charts
from makd.report.curves import moments
from makd.report.elements import Markup, element, join, missing, scrolled, section, table
from makd.report.glance import ROLES, latency_ratios, measured, role_name
from makd.report.record import Record
from makd.report.words import number, seconds, share
from makd.run_files import LINEARS, SAMPLES, TRAINING, WARNINGS
from makd.words import is_joined, word_begin


def quality(record: Record) -> Markup:
    """Everything of `metrics.json`, and the student's costs beside the teacher's."""
    metrics = record.metrics
    head, rows = table_of(metrics, ["measure", "teacher", "before training", "student"])
    found = [[name.strip(), *others] for name, *others in rows]
    costs = [
        {"what": name, "share": metrics["params"][key]["student"] / metrics["params"][key]["teacher"]}
        for key, name in (("total", "parameters"), ("linears", "of the linears"))
    ]
    if "bytes" in metrics:
        costs.append({"what": "bytes on disk", "share": metrics["bytes"]["student"] / metrics["bytes"]["teacher"]})
    costs += [
        {"what": f"time, batch {name.removeprefix('batch')}", "share": value}
        for name, value in latency_ratios(metrics).items()
    ]
    told = "What the student costs, of the teacher's: shorter is better, and the dashed line is the teacher."
    chart = charts.figure(
        "Costs",
        told,
        charts.bars(costs, "what", "share", "of the teacher's"),
        ["cost", "of the teacher's"],
        [[row["what"], share(row["share"])] for row in costs],
    )
    notes = (
        []
        if "fidelity" in metrics
        else [
            missing(
                "the student was never compared with its teacher in this run",
                "`makd evaluate` does that where both fit into memory.",
            )
        ]
    )
    return section(
        record.key("quality"),
        "Quality and costs",
        element(
            "div",
            element("div", table(head, found, "Measurements, on held-out text", 1), *notes),
            chart,
            class_="beside",
        ),
    )


def linear_map(record: Record) -> Markup:
    """Layers by roles: how much was kept, what was predicted to be lost, and what is."""
    found = record.of(LINEARS)
    if "missing" in found:
        return section(record.key("map"), "Map of the linears", missing(found["missing"], found.get("how")))
    rows = found["linears"]
    known = {row["layer"] for row in rows}
    roles = sorted({tuple(row["roles"]) for row in rows}, key=_role_order)
    views = [
        (
            "kept",
            "Rank",
            "rank; the colour is the share of the dense weights that is gone, of linears that share one A together",
        ),
        (
            "predicted",
            "Predicted error",
            "per cent of the output that the solver predicted to be lost, of each linear by itself",
        ),
        (
            "measured",
            "Measured error",
            "error in the student, in per cent of the output's variance, with what the layers before it lost",
        ),
    ]
    if all(row["predicted_error"] is None for row in rows):
        views = [view for view in views if view[0] != "predicted"]
    if all(measured(row) is None for row in rows):
        views = [view for view in views if view[0] != "measured"]
    switches, tables = [], []
    for at, (key, title, told) in enumerate(views):
        name = record.key(f"map-{key}")
        switches += [
            element(
                "input",
                type="radio",
                name=record.key("map-view"),
                id=name,
                class_=f"pick-{key}",
                checked=at == len(views) - 1,
                value=key,
            ),
            element("label", title, for_=name),
        ]
        tables.append(
            element(
                "div",
                element("p", told[:1].upper() + told[1:] + "."),
                _heat(rows, sorted(known), roles, key, title),
                class_=f"view map-{key}",
            )
        )
    dense = sum(row["rank"] is None for row in rows)
    told = f"{len(rows) - dense} of {len(rows)} linears have factors" + (f"; {dense} stayed dense." if dense else ".")
    told += " Layers count from 0."
    notes = [
        element("p", told),
        *_dropped(found),
        *([missing(found["not_measured"])] if "not_measured" in found else []),
    ]
    return section(
        record.key("map"),
        "Map of the linears",
        *notes,
        element("fieldset", element("legend", "Show"), *switches, *tables, class_="switch"),
        _all_linears(rows, moments(record)),
    )


def _role_order(roles: tuple[str, ...]) -> tuple[int, str]:
    order = [*ROLES]
    return (order.index(roles[0]) if roles and roles[0] in order else len(order), " ".join(roles))


def _heat(rows: list[Any], layers: list[int], roles: list[tuple[str, ...]], key: str, title: str) -> Markup:
    by_place = {(row["layer"], tuple(row["roles"])): row for row in rows}
    by_name = {row["name"]: row for row in rows}
    lines = []
    for layer in layers:
        cells = [element("th", layer, scope="row")]
        for role in roles:
            row = by_place.get((layer, role))
            text, value = ("", None) if row is None else _cell(row, key, by_name)
            style = None if value is None else f"--heat:{100 * min(1.0, max(0.0, value)):.0f}%"
            cells.append(element("td", text, style=style, title=None if row is None else row["name"]))
        lines.append(element("tr", cells))
    head = [
        element("th", "layer", scope="col"),
        *(element("th", " ".join(role), scope="col", title=role_name([*role])) for role in roles),
    ]
    return scrolled(
        element(
            "table",
            element("caption", f"{title} by layer and role", class_="hidden"),
            element("thead", element("tr", head)),
            element("tbody", lines),
            class_="heat",
        ),
        f"{title} by layer and role",
    )


def _cell(row: Mapping[str, Any], key: str, rows: Mapping[str, Any]) -> tuple[str, float | None]:
    """What a cell shows, and how warm it is, 0 to 1; `rows` are all by name."""
    if key == "kept":
        if row["rank"] is None:
            return "dense", None
        group = [row, *(rows[name] for name in row["shares_input_with"] if name in rows)]
        if len(group) == 1:
            return f"{row['rank']}", 1 - row["weights"] / row["weights_dense"]
        factors = row["rank"] * (row["in_features"] + sum(one["out_features"] for one in group))
        return f"{row['rank']}", 1 - factors / sum(one["weights_dense"] for one in group)
    value = row["predicted_error"] if key == "predicted" else measured(row)
    return ("-", None) if value is None else (f"{100 * value:.2g}", value**0.5)


def _all_linears(rows: list[Any], when: Mapping[str, str]) -> Markup:
    lines = [
        [
            row["name"],
            row["layer"],
            " ".join(row["roles"]),
            f"{row['out_features']} x {row['in_features']}",
            row["rank"] if row["rank"] is not None else f"dense: {row['why_dense']}",
            row["break_even"],
            number(row["predicted_error"]),
            *(number(row["measured_error"].get(moment)) for moment in when),
            row["fallback"] or "",
        ]
        for row in rows
    ]
    head = [
        "linear",
        "layer",
        "role",
        "out x in",
        "rank",
        "break-even",
        "predicted",
        *(f"measured {moment}" if len(when) > 1 else "measured" for moment in when),
        "fallback",
    ]
    return element(
        "details", element("summary", f"All {len(rows)} linears, one by one"), table(head, lines, "All linears", 3)
    )


def _dropped(found: Mapping[str, Any]) -> list[Markup]:
    lines = [
        element("li", element("code", name), f": layer left out; {why}.")
        for name, why in found.get("dropped", {}).items()
    ]
    lines += [
        element("li", element("code", one["name"]), f": factored vocabulary, rank {one['rank']}.")
        for one in found.get("vocabulary", [])
    ]
    lines += [
        element("li", element("code", name), f": dense; {why}.") for name, why in found.get("dense_besides", {}).items()
    ]
    shared = [one for one in found.get("shared_inputs", []) if one["shared"]]
    if shared:
        lines.append(
            element(
                "li",
                f"{len(shared)} of {len(found['shared_inputs'])} groups of linears that read the same input share one "
                "factor.",
            )
        )
    return [element("ul", lines)] if lines else []


def samples(record: Record) -> Markup:
    """What both make of a few held-out texts."""
    found = record.of(SAMPLES)
    if "missing" in found:
        how = "Set recipe.evaluation.samples to keep some." if "samples is 0" in found["missing"] else found.get("how")
        return section(record.key("samples"), "Samples", missing(found["missing"], how))
    if found["kind"] == "continuations":
        told = "Held-out prompts, and how each model goes on, by its likeliest token. Marked: from where on they part."
        return section(
            record.key("samples"), "What they write", element("p", told), [_continued(row) for row in found["rows"]]
        )
    told = (
        f"Of {found['texts']} held-out texts, the {found['nearest']} nearest to each by either model: "
        f"{share(found['kept'])} are the same."
    )
    return section(
        record.key("samples"), "Nearest neighbours", element("p", told), [_near(row) for row in found["rows"]]
    )


def _continued(row: Mapping[str, Any]) -> Markup:
    theirs, ours = row["teacher"], row["student"]
    same = next(
        (at for at, (one, other) in enumerate(zip(theirs, ours, strict=False)) if one != other),
        min(len(theirs), len(ours)),
    )
    while same and any(is_joined(text[same]) for text in (theirs, ours) if text[same:]):
        same -= 1  # from the letter on whose mark is another
    same = len(theirs) if theirs == ours else word_begin(theirs, same)
    sides = [
        element(
            "div",
            element("h3", name),
            element("p", text[:same], element("mark", text[same:]) if text[same:] else None, dir="auto"),
        )
        for name, text in (("Teacher", theirs), ("Student", ours))
    ]
    if "reference" in row:
        sides.append(element("div", element("h3", "The data's own"), element("p", row["reference"], dir="auto")))
    return element(
        "article",
        element("p", element("span", "Prompt", class_="label"), element("bdi", row["prompt"])),
        element("div", sides, class_="sides"),
        class_="sample",
    )


def _near(row: Mapping[str, Any]) -> Markup:
    both = [{one["text"] for one in row[side]} for side in ("teacher", "student")]
    sides = []
    for at, side in enumerate(("teacher", "student")):
        lines = [
            element(
                "li",
                element("span", f"{one['cosine']:.2f}", class_="label"),
                element("bdi", one["text"]),
                None if one["text"] in both[1 - at] else element("em", " (not in the other's)"),
            )
            for one in row[side]
        ]
        sides.append(element("div", element("h3", side.capitalize()), element("ol", lines)))
    return element(
        "article",
        element("p", element("span", "Text", class_="label"), element("bdi", row["text"])),
        element("div", sides, class_="sides"),
        class_="sample",
    )


def warnings(record: Record) -> Markup:
    """What was warned of, and what was done otherwise than asked for."""
    found, made = record.of(WARNINGS), record.of(LINEARS)
    parts: list[Markup] = []
    if "missing" in found:
        parts.append(missing(found["missing"], found.get("how")))
    else:
        lines = [
            element("li", row["text"], f" ({row['times']} times)" if row["times"] > 1 else None)
            for row in found["rows"]
        ]
        parts.append(element("ul", lines) if lines else element("p", "No warnings."))
    kinds: dict[str, list[str]] = {}
    for row in made.get("linears", []):
        if row["fallback"]:
            kinds.setdefault(row["fallback"], []).append(row["name"])
    for fallback, names in kinds.items():
        told = element("p", f"Fallback at {len(names)} linears: {fallback}.")
        listed = element("p", ", ".join(names))
        parts += [told, element("details", element("summary", "Which"), listed) if len(names) > 1 else listed]
    for at, training in enumerate(record.of(TRAINING).get("trainings", []), start=1):
        if training["off"]:
            stage = f" of training {at}" if len(record.of(TRAINING)["trainings"]) > 1 else ""
            parts.append(element("p", f"Aspects{stage} that are off for this model:"))
            parts.append(
                element(
                    "ul", [element("li", element("code", name), f": {why}.") for name, why in training["off"].items()]
                )
            )
    return section(record.key("warnings"), "Warnings and fallbacks", *parts)


def recipe(record: Record) -> Markup:
    """Settings, versions and machine."""
    environment = record.environment
    versions = [[name, value or "not installed"] for name, value in environment.get("versions", {}).items()]
    machine = [[name.replace("_", " "), str(value)] for name, value in environment.items() if name != "versions"]
    spent = [[stage, seconds(value)] for stage, value in record.metrics.get("seconds", {}).items()]
    tokens = [[f"tokens: {stage}", f"{value:,}"] for stage, value in record.metrics.get("tokens", {}).items()]
    return section(
        record.key("recipe"),
        "Recipe, versions, machine",
        element(
            "details",
            element("summary", "Every setting of the run"),
            element("pre", element("code", as_yaml(record.recipe)), tabindex="0", aria_label="recipe.yaml"),
        ),
        element(
            "div",
            table(["machine", "is"], machine, "Machine", 2) if machine else missing("environment.json is not there"),
            table(["package", "version"], versions, "Versions", 2) if versions else None,
            table(["stage", "took"], [*spent, *tokens], "Time and text"),
            class_="beside",
        ),
    )


def as_yaml(content: Any) -> str:
    """Settings as `recipe.yaml` has them."""
    return dump_yaml(content) if content else "recipe.yaml is not there"


def name_of_run(record: Record) -> Markup:
    """Teacher and folder, above a run's sections."""
    return join(element("code", record.teacher), " → ", element("code", record.name))
