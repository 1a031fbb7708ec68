"""Charts: a Vega-Lite spec each, with a sentence that says what it shows and a table that holds its numbers.

The browser draws them, as SVG. Colours are of middling lightness, so that they stand out on white, on black and on
paper; axes and texts take the colour of the text around them.
"""

import math
from collections.abc import Sequence
from typing import Any

from makd.report.elements import Markup, element, embedded_json, table
from makd.report.words import score

COLOURS = ("#2f7fd6", "#d2601a", "#1a936f", "#a45bd0", "#cf4480", "#8a7a12", "#d34a4a", "#5a7d9a")
"""Each at least 3:1 beside white and beside near-black; neighbours differ in lightness and shape or dash besides."""
FIRST, LAST = "#2f7fd6", "#d2601a"
"""Of layers, from the first to the last."""
BEFORE, AFTER = "before training", "after training"
Rows = Sequence[dict[str, Any]]


def figure(
    title: str, told: str, spec: dict[str, Any], head: list[str], rows: list[list[Any]], left: int = 1
) -> Markup:
    """A chart with its title, what it tells in words, and its numbers."""
    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "width": "container",
        "height": 180,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "description": f"{title}. {told}",
        **spec,
    }
    cells = [[_cell(one) for one in row] for row in rows]
    return element(
        "figure",
        element("figcaption", element("strong", title), element("span", told)),
        element("div", class_="chart", data_chart=True),
        embedded_json(whole),
        element(
            "details",
            element("summary", "The numbers", element("span", f" of {title}", class_="hidden")),
            table(head, cells, title, left),
        ),
    )


def _cell(value: Any) -> Any:
    """What a table of numbers has for a value; of one that is not there, as a standard error of one seed, a dash."""
    if value is None:
        return "-"
    return score(value) if isinstance(value, float) else value


def lines(
    data: Rows,
    across: tuple[str, str],
    upwards: tuple[str, str],
    by: str | None,
    *,
    order: Sequence[str] = (),
    log: bool = False,
    points: bool = True,
    whole: bool = True,
) -> dict[str, Any]:
    """A spec of one line for each value of `by`.

    Args:
        data: rows.
        across: column and title of the x axis.
        upwards: the same of the y axis.
        by: column that tells lines apart; None for one line.
        order: its values.
        log: whether y is logarithmic.
        points: whether points are drawn, too.
        whole: whether x are whole numbers.
    """
    x, y = across, upwards
    scale = {"type": "log"} if log else {"zero": True}
    encoding: dict[str, Any] = {
        "x": {
            "field": x[0],
            "type": "quantitative",
            "title": x[1],
            "axis": {"tickMinStep": 1, "format": "d"} if whole else {},
            "scale": {"zero": False, "nice": False},
        },
        "y": {"field": y[0], "type": "quantitative", "title": y[1], "scale": scale},
        "tooltip": [
            *([{"field": by, "type": "nominal"}] if by else []),
            {"field": x[0], "title": x[1]},
            {"field": y[0], "title": y[1], "format": ".4~g"},
        ],
    }
    if by is not None:
        names = list(order) or list(dict.fromkeys(row[by] for row in data))
        colours = [COLOURS[at % len(COLOURS)] for at in range(len(names))]
        dashes = [[6, 4] if at % 2 == 0 and len(names) > 1 else [1, 0] for at in range(len(names))]
        legend = {"orient": "top", "title": None, "symbolType": "stroke"}
        encoding["color"] = {
            "field": by,
            "type": "nominal",
            "scale": {"domain": names, "range": colours},
            "legend": legend,
        }
        encoding["strokeDash"] = {
            "field": by,
            "type": "nominal",
            "scale": {"domain": names, "range": dashes},
            "legend": legend,
        }
    mark: dict[str, Any] = {"type": "line", "strokeWidth": 2, "aria": False}
    if by is None:
        mark["color"] = COLOURS[0]
    if points:
        mark["point"] = {"size": 36, "filled": True, **({} if by else {"color": COLOURS[0]})}
    return {"data": {"values": list(data)}, "mark": mark, "encoding": encoding}


def bars(data: Rows, label: str, value: str, title: str) -> dict[str, Any]:
    """A spec of a bar for each row, which ends in its number, a share; 1 is what the shares are of."""
    shared = {
        "y": {"field": label, "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 220}},
        "x": {
            "field": value,
            "type": "quantitative",
            "title": title,
            "axis": {"format": "%"},
            "scale": {"domainMin": 0, "domainMax": max(1.15, *(1.15 * row[value] for row in data))},
        },
    }
    tooltip = [{"field": label}, {"field": value, "title": title, "format": ".1%"}]
    return {
        "data": {"values": list(data)},
        "height": 30 * len(data),
        "encoding": shared,
        "layer": [
            {
                "mark": {"type": "bar", "color": COLOURS[0], "height": 16, "aria": False},
                "encoding": {"tooltip": tooltip},
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 4, "aria": False},
                "encoding": {"text": {"field": value, "format": ".0%"}},
            },
            {
                "mark": {"type": "rule", "color": COLOURS[1], "strokeDash": [4, 3], "aria": False},
                "encoding": {"x": {"datum": 1}, "y": None},
            },
        ],
    }


def difference(name: str, gain: float, error: float | None) -> dict[str, Any]:
    """A row of `differences`; without a standard error, as of one seed, its bar has no length."""
    reach = error or 0.0
    return {"name": name, "gain": gain, "error": error, "low": gain - reach, "high": gain + reach}


def differences(data: Rows, title: str, form: str) -> dict[str, Any]:
    """A spec of points with bars of their standard errors, one below the other, beside a line at zero.

    Args:
        data: rows made by `difference`.
        title: of the x axis.
        form: of the numbers that are shown at a point.
    """
    y = {
        "field": "name",
        "type": "nominal",
        "title": None,
        "sort": [row["name"] for row in data],
        "axis": {"labelLimit": 180},
    }
    x = {"field": "gain", "type": "quantitative", "title": title, "scale": {"zero": True}}
    tooltip = [{"field": "name"}, *({"field": field, "format": form} for field in ("gain", "low", "high"))]
    return {
        "data": {"values": list(data)},
        "height": 26 * len(data),
        "layer": [
            {
                "mark": {"type": "rule", "color": COLOURS[1], "strokeDash": [4, 3], "aria": False},
                "encoding": {"x": {"datum": 0}},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 2, "color": COLOURS[0], "aria": False},
                "encoding": {"y": y, "x": {**x, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {
                    "type": "point",
                    "filled": True,
                    "size": 70,
                    "opacity": 1,
                    "color": COLOURS[0],
                    "aria": False,
                },
                "encoding": {"y": y, "x": x, "tooltip": tooltip},
            },
        ],
    }


def spectrum(data: Rows, chosen: Rows, layers: int, upwards: str) -> dict[str, Any]:
    """A spec of the curves of one role, a line a layer, with the chosen ranks as points."""
    colour = {
        "field": "layer",
        "type": "quantitative",
        "legend": None,
        "scale": {"domain": [0, max(1, layers - 1)], "range": [FIRST, LAST], "interpolate": "lab"},
    }
    x = {
        "field": "rank",
        "type": "quantitative",
        "title": "rank",
        "scale": {"type": "log"},
        "axis": {"format": "~s", "values": [1, 4, 16, 64, 256, 1024, 4096], "grid": False},
    }
    lowest = min([0.01, *(0.5 * row["value"] for row in chosen if row["value"] > 0)])
    floor = 10 ** math.floor(math.log10(max(lowest, 1e-4)))
    y = {
        "field": "value",
        "type": "quantitative",
        "title": upwards,
        "scale": {"type": "log", "domain": [floor, 1], "clamp": True},
        "axis": {
            "format": "~%",
            "values": [at for at in (1e-4, 1e-3, 1e-2, 1e-1, 1) if at >= floor],
            "labelOverlap": False,
        },
    }
    data = [row for row in data if row["value"] >= floor]
    tooltip = [
        {"field": "linear", "type": "nominal"},
        {"field": "layer"},
        {"field": "rank"},
        {"field": "value", "title": upwards, "format": ".3~g"},
    ]
    shared = {"x": x, "y": y, "color": colour}
    return {
        "height": 150,
        "layer": [
            {
                "data": {"values": list(data)},
                "mark": {"type": "line", "strokeWidth": 1.5, "opacity": 0.85, "aria": False},
                "encoding": {**shared, "detail": {"field": "linear"}},
            },
            {
                "data": {"values": list(chosen)},
                "mark": {
                    "type": "point",
                    "size": 55,
                    "filled": True,
                    "opacity": 1,
                    "stroke": "currentColor",
                    "strokeWidth": 0.8,
                    "aria": False,
                },
                "encoding": {**shared, "tooltip": tooltip},
            },
        ],
    }


def frontier(
    data: Rows, across: tuple[str, str], upwards: tuple[str, str], by: str, error: str | None = None
) -> dict[str, Any]:
    """A spec of points, each with its name, and a bar of its standard error where that is not None; x are shares."""
    names = list(dict.fromkeys(row[by] for row in data))
    shapes = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]
    x = {
        "field": across[0],
        "type": "quantitative",
        "title": across[1],
        "scale": {"zero": False, "padding": 24},
        "axis": {"format": "~%", "tickCount": 6},
    }
    y = {"field": upwards[0], "type": "quantitative", "title": upwards[1], "scale": {"zero": False, "padding": 20}}
    legend = {"orient": "bottom", "title": None, "columns": 2, "labelLimit": 260}
    scale = {"domain": names, "range": [COLOURS[at % len(COLOURS)] for at in range(len(names))]}
    marks = {"domain": names, "range": [shapes[(at + at // len(COLOURS)) % len(shapes)] for at in range(len(names))]}
    colour = {"field": by, "type": "nominal", "scale": scale, "legend": legend}
    tooltip = [
        {"field": by, "type": "nominal"},
        {"field": across[0], "title": across[1], "format": ".1%"},
        {"field": upwards[0], "title": upwards[1], "format": ".4~g"},
    ]
    points: dict[str, Any] = {
        "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1, "aria": False},
        "encoding": {
            "x": x,
            "y": y,
            "color": colour,
            "shape": {"field": by, "type": "nominal", "scale": marks, "legend": legend},
            "tooltip": tooltip,
        },
    }
    layer = [points]
    if error is not None:
        layer.insert(
            0,
            {
                "transform": [
                    {"filter": f"datum['{error}'] != null"},
                    {"calculate": f"datum['{upwards[0]}'] - datum['{error}']", "as": "low"},
                    {"calculate": f"datum['{upwards[0]}'] + datum['{error}']", "as": "high"},
                ],
                "mark": {"type": "rule", "strokeWidth": 1.5, "aria": False},
                "encoding": {
                    "x": x,
                    "y": {"field": "low", "type": "quantitative", "title": upwards[1], "scale": y["scale"]},
                    "y2": {"field": "high"},
                    "color": colour,
                },
            },
        )
    return {"data": {"values": list(data)}, "height": 300, "layer": layer}
