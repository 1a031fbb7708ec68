"""Station 10: what the lines of a comparison say together: means, standard errors, differences."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

Line = Mapping[str, Any]
Scores = Mapping[tuple[str, int], float]
"""(task, seed) -> score of one method at one budget."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, with its standard error."""

    value: float
    error: float | None
    """None of a single number."""
    count: int


@dataclass(frozen=True)
class Difference:
    """How a method's scores differ from another's, paired over task and seed."""

    mean: float
    errors: float | None
    """The mean in standard errors of itself; None where there is one pair, or all pairs differ by the same."""
    probability: float | None
    """Two-sided p of the paired t-test."""
    count: int


def mean(values: Iterable[float]) -> Mean | None:
    """Mean and standard error; None of nothing."""
    numbers = [float(value) for value in values]
    if not numbers:
        return None
    error = float(stats.sem(numbers)) if len(numbers) > 1 else None
    return Mean(sum(numbers) / len(numbers), error, len(numbers))


def scores(lines: Iterable[Line], value: Callable[[Line], float | None]) -> dict[tuple[str, int], float]:
    """A number of each line by task and seed, where it has one."""
    found = {(str(line["cell"]["task"]), int(line["cell"]["seed"])): value(line) for line in lines}
    return {key: float(number) for key, number in found.items() if number is not None}


def average(found: Scores, tasks: Sequence[str]) -> Mean | None:
    """Mean over tasks, then over those seeds that have all of them; None without such a seed."""
    seeds = dict.fromkeys(seed for _, seed in found)
    whole = [seed for seed in seeds if all((task, seed) in found for task in tasks)]
    return mean(sum(found[task, seed] for task in tasks) / len(tasks) for seed in whole)


def difference(ours: Scores, theirs: Scores) -> Difference | None:
    """Ours minus theirs over the tasks and seeds that both have; None if they share none."""
    pairs = [ours[key] - theirs[key] for key in ours if key in theirs]
    if not pairs:
        return None
    centre = sum(pairs) / len(pairs)
    spread = float(stats.sem(pairs)) if len(pairs) > 1 else 0.0
    if spread < 1e-12:
        return Difference(centre, None, None, len(pairs))
    errors = centre / spread
    return Difference(centre, errors, float(2 * stats.t.sf(math.fabs(errors), len(pairs) - 1)), len(pairs))
