"""Station 10: quality against budget as a picture, drawn by matplotlib: one line a method, one point a budget."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = Mapping[str, Sequence[tuple[float, float]]]
"""Method -> (parameters, average score), both as shares of the teacher's."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by colour-blind readers too (Okabe & Ito)."""
DASHES = (("-", "o"), ("--", "s"), (":", "^"))
"""Dash and marker of lines that have the same colour."""


def can_draw() -> bool:
    """Whether matplotlib is there, which `pip install 'makd[compare]'` brings."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def svg(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure of that many inches to draw on, which is then written: text as text, the same file for the same lines.

    Raises:
        OSError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "makd"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, format="svg", metadata={"Date": None})


def draw(curves: Curves, across: str, upwards: str, path: Path) -> None:
    """Write a line for each method to `path` as SVG, in percent.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.ticker import PercentFormatter

    with svg(path, 7.5, 3.8) as figure:
        axes = figure.add_subplot(xlabel=across, ylabel=upwards)
        axes.margins(x=0.1)
        axes.grid(color="#ddd")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(xmax=1))
        for index, (name, line) in enumerate(curves.items()):
            sizes, values = zip(*sorted(line), strict=True)
            colour, (dash, marker) = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
            axes.plot(sizes, values, marker=marker, color=colour, linestyle=dash, label=name)
        figure.legend(loc="outside right upper", frameon=False)
