"""Station 10: how long the cells that are open will take, by those that are done."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from makd.comparison.cells import Cell

FACTORS = ("task", "method", "budget")
"""What a cell's time depends on: each of these multiplies it, whatever the others are."""


def own_seconds(line: Mapping[str, Any]) -> float:
    """Seconds of a cell without those of the cache that it shares with others."""
    seconds = line["seconds"]
    return float(seconds["total"] - seconds.get("cache", 0.0))


def forecast_seconds(cells: Iterable[Cell], done: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of one process for `cells`, on the machine of the lines `done`; their teachers and caches come besides.

    Logarithms of the seconds are their mean and a term for each task, method and budget, found by least squares. Of all
    solutions the shortest is taken, in which a value that no line has yet is like the average of the others.

    Raises:
        ValueError: `done` is empty.
    """
    if not done:
        raise ValueError("nothing is done yet: there is no time to go by")
    names = [line["cell"] for line in done]
    values = list(dict.fromkeys((key, name[key]) for name in names for key in FACTORS))

    def indicators(names: Sequence[Mapping[str, Any]]) -> np.ndarray:
        table = [[float(name[key] == value) for key, value in values] for name in names]
        return np.array(table).reshape(len(names), len(values))

    logarithms = np.log([own_seconds(line) for line in done])
    terms, *_ = np.linalg.lstsq(indicators(names), logarithms - logarithms.mean(), rcond=None)
    return float(np.exp(logarithms.mean() + indicators([cell.names for cell in cells]) @ terms).sum())
