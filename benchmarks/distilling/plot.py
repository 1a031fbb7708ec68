"""Lines on two logarithmic axes as SVG, drawn by matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from makd.comparison.plot import COLOURS, svg

Series = Mapping[str, Sequence[tuple[float, float]]]


def draw(panels: Sequence[tuple[str, str, Series]], across: str, path: Path) -> None:
    """Panels (title, what stands upwards, lines by name) side by side over the same kind of axis, and one legend."""
    with svg(path, 4.2 * len(panels), 3.4) as figure:
        for index, (title, upwards, series) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), index + 1, title=title, xlabel=across, ylabel=upwards)
            axes.loglog()
            axes.grid(color="#ddd")
            axes.xaxis.set_major_locator(FixedLocator(sorted({x for line in series.values() for x, _ in line})))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(_short))
                axis.set_minor_locator(NullLocator())
            for colour, (name, line) in zip(COLOURS, series.items(), strict=False):
                label = name if index == 0 else None
                axes.plot(*zip(*sorted(line), strict=True), marker="o", color=colour, label=label)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)


def _short(value: float, _place: int | None) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
