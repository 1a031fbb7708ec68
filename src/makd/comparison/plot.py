"""Station 10: quality against budget as SVG, without a plotting library: budgets side by side, one line a method."""

from collections.abc import Mapping, Sequence
from html import escape

Curves = Mapping[str, Sequence[tuple[str, float]]]
"""Method -> (budget, share of the teacher's average)."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Told apart by colour-blind readers too (Okabe & Ito)."""
DASHES = ("none", "6 3", "2 2")
"""Of lines that have the same colour."""
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 460, 320, 62, 20, 46, 190


def figure(curves: Curves, across: str, upwards: str) -> str:
    """Lines over budgets in their order, with a legend on the right. Heights are in percent."""
    budgets = list(dict.fromkeys(budget for line in curves.values() for budget, _ in line))
    values = [value for line in curves.values() for _, value in line]
    room = 0.05 * (max(values) - min(values)) or 0.01
    low, high = min(values) - room, max(values) + room
    floor, right = HEIGHT - BOTTOM, WIDTH - 20

    def place(budget: str, value: float) -> tuple[float, float]:
        x = LEFT + (budgets.index(budget) + 0.5) / len(budgets) * (right - LEFT)
        return x, floor - (value - low) / (high - low) * (floor - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + LEGEND}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH + LEGEND} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH + LEGEND}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>',
        f'<text x="14" y="{(TOP + floor) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {(TOP + floor) / 2})">{escape(upwards)}</text>',
    ]
    for budget in budgets:
        x, _ = place(budget, low)
        parts.append(f'<path d="M{x:.1f} {TOP}V{floor}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{escape(budget)}</text>')
    for step in range(5):
        value = low + step / 4 * (high - low)
        _, y = place(budgets[0], value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * value:.1f} %</text>')
    for index, (name, line) in enumerate(curves.items()):
        parts += _curve(name, [place(budget, value) for budget, value in line], index)
    return "\n".join([*parts, "</svg>", ""])


def _curve(name: str, places: Sequence[tuple[float, float]], index: int) -> list[str]:
    """A line with its points, and its entry in the legend."""
    colour, dash = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"'
    top = TOP + 12 + 18 * index
    return [
        f'<path d="M{path}" {style}/>',
        *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places),
        f'<path d="M{WIDTH} {top - 4}H{WIDTH + 24}" {style}/>',
        f'<text x="{WIDTH + 30}" y="{top}">{escape(name)}</text>',
    ]
