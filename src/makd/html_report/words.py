"""Numbers as people read them."""

import math

Number = int | float
"""As JSON has them."""


def count(number: Number) -> str:
    """17394048 -> 17.4 million."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if abs(number) >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,.0f}"


def share(number: Number) -> str:
    """0.766 -> 76.6%."""
    return f"{100 * number:.1f}%"


def number(value: Number | None) -> str:
    """Three digits that tell something; a dash for None."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.1e}"


def times(ratio: Number) -> str:
    """How many times as fast something is that takes `ratio` of the time."""
    if 0.97 <= ratio <= 1.03:
        return "about as fast"
    return f"{1 / ratio:.2f} times as fast" if ratio < 1 else f"{ratio:.2f} times slower"


def seconds(value: Number) -> str:
    """A duration."""
    if value < 100:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 6000 else f"{value / 3600:.3g} h"
