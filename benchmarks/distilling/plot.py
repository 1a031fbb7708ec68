"""Lines on two logarithmic axes, as SVG: what the pages need, without a plotting library."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Series = Mapping[str, Sequence[tuple[float, float]]]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Told apart by colour-blind readers too (Okabe & Ito)."""
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 380, 300, 62, 34, 46


def figure(panels: Sequence[tuple[str, str, Series]], across: str) -> str:
    """Panels (title, what stands upwards, lines by name) side by side over the same kind of axis, and one legend."""
    width, height = WIDTH * len(panels), HEIGHT + 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for index, (title, upwards, series) in enumerate(panels):
        parts += [f'<g transform="translate({index * WIDTH} 0)">', *_panel(title, upwards, across, series), "</g>"]
    names = list(dict.fromkeys(name for _, _, series in panels for name in series))
    for index, name in enumerate(names):
        start, colour = LEFT + index * 150, COLOURS[index % len(COLOURS)]
        parts.append(f'<rect x="{start}" y="{HEIGHT + 6}" width="18" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{start + 24}" y="{HEIGHT + 12}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(title: str, upwards: str, across: str, series: Series) -> list[str]:
    points = [point for line in series.values() for point in line]
    horizontal, vertical = (_axis([point[side] for point in points]) for side in (0, 1))
    right, floor = WIDTH - 16, HEIGHT - BOTTOM

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return (
            LEFT + _share(point[0], horizontal) * (right - LEFT),
            floor - _share(point[1], vertical) * (floor - TOP),
        )

    parts = [f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>',
             f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>',
             f'<text x="14" y="{(TOP + floor) / 2}" text-anchor="middle" '
             f'transform="rotate(-90 14 {(TOP + floor) / 2})">{escape(upwards)}</text>']  # fmt: skip
    for value in sorted({point[0] for point in points}):
        x = place((value, vertical[0]))[0]
        parts.append(f'<path d="M{x:.1f} {TOP}V{floor}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{_short(value)}</text>')
    for value in _ticks(vertical):
        y = place((horizontal[0], value))[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for index, line in enumerate(series.values()):
        colour = COLOURS[index % len(COLOURS)]
        places = [place(point) for point in sorted(line)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    return parts


def _axis(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis, with a little room."""
    low, high = min(values), max(values)
    room = max(1.05, (high / low) ** 0.05)
    return low / room, high * room


def _share(value: float, axis: tuple[float, float]) -> float:
    return math.log(value / axis[0]) / math.log(axis[1] / axis[0])


def _ticks(axis: tuple[float, float]) -> list[float]:
    powers = range(math.floor(math.log10(axis[0])), math.ceil(math.log10(axis[1])) + 1)
    fine = [step * 10.0**power for power in powers for step in (1, 2, 5) if axis[0] <= step * 10.0**power <= axis[1]]
    whole = [value for value in fine if math.isclose(math.log10(value) % 1, 0, abs_tol=1e-9)]
    return whole if len(whole) > 2 else fine


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"
