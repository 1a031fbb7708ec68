"""Numbers as people read them."""

import math

Number = int | float
"""As JSON has them."""
SCORE_DIGITS = 5


def count(value: Number) -> str:
    """17394048 -> 17.4 million."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if abs(value) >= 0.9995 * size:  # with three digits it is one
            return f"{number(value / size)} {word}"
    return f"{value:,.0f}"


def share(number: Number) -> str:
    """0.766 -> 76.6%."""
    return f"{100 * number:.1f}%"


def number(value: Number | None, digits: int = 3) -> str:
    """So many digits that tell something, in fixed point below 100,000; a dash for None."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{places}f}"
        return text.rstrip("0").rstrip(".") if places else text
    return f"{value:.{max(1, digits - 2)}e}"


def score(value: Number | None) -> str:
    """With five digits: students differ in the fourth, and a nearly perfect one is not perfect."""
    return number(value, SCORE_DIGITS)


def times(ratio: Number) -> str:
    """How many times as fast something is that takes `ratio` of the time."""
    if 0.97 <= ratio <= 1.03:
        return "about as fast"
    return f"{1 / ratio:.2f} times as fast" if ratio < 1 else f"{ratio:.2f} times slower"


def seconds(value: Number) -> str:
    """A duration."""
    if value < 100:
        return f"{number(value)} s"
    return f"{number(value / 60)} min" if value < 6000 else f"{number(value / 3600)} h"
