"""Station 10: what the lines of a comparison say together: means, standard errors, differences."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

Line = Mapping[str, Any]
Scores = Mapping[tuple[str, int], float]
"""(task, seed) -> score of one method at one budget."""

_NO_SPREAD = 1e-12
"""Standard errors below this are rounding."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds, with its standard error."""

    value: float
    error: float | None
    """None of a single number."""
    count: int


@dataclass(frozen=True)
class Errors:
    """A mean difference in standard errors of itself."""

    count: float
    probability: float
    """Two-sided p of the t-test."""
    error: float
    """The standard error."""

    def text(self, where: str = "") -> str:
        """For a person; `where` says of which spread, where there are two."""
        return f"{self.count:+.1f} SE{where} (p {self.probability:.2g})"


@dataclass(frozen=True)
class Difference:
    """How a method's scores differ from another's, paired over task and seed."""

    mean: float
    """Over tasks, of the means over their seeds."""
    over_seeds: Errors | None
    """The spread is that of the seeds of each task, pooled: the question is about these very tasks, taught with other
    seeds. None where each task has one pair, or its pairs do not differ."""
    over_tasks: Errors | None
    """The spread is that of the tasks' means: the question is about other tasks like these, of which more seeds tell
    nothing more. None of one task, or where tasks do not differ."""

    def text(self) -> str:
        """The errors for a person; empty where there are none."""
        known = ((self.over_seeds, " over seeds"), (self.over_tasks, " over tasks"))
        return ", ".join(errors.text(where) for errors, where in known if errors is not None)


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


def pairs(ours: Scores, theirs: Scores) -> dict[tuple[str, int], float]:
    """Ours minus theirs of each task and seed that both have."""
    return {key: ours[key] - theirs[key] for key in ours if key in theirs}


def difference(gains: Scores) -> Difference | None:
    """Mean paired difference with standard errors over seeds and over tasks; None for no pairs.

    Every task counts the same, however many of its seeds are there, as in `average`.
    """
    if not gains:
        return None
    by_task: dict[str, list[float]] = {}
    for (task, _seed), value in gains.items():
        by_task.setdefault(task, []).append(value)
    groups = list(by_task.values())
    means = [sum(group) / len(group) for group in groups]
    centre = sum(means) / len(means)
    freedom = sum(map(len, groups)) - len(groups)
    squares = sum((value - middle) ** 2 for group, middle in zip(groups, means, strict=True) for value in group)
    # of the mean of means: each has the pooled variance over its number of seeds
    share = sum(1 / len(group) for group in groups) / len(groups) ** 2
    over_seeds = _errors(centre, squares / freedom * share, freedom) if freedom else None
    others = len(means) - 1
    between = sum((middle - centre) ** 2 for middle in means)
    over_tasks = _errors(centre, between / others / len(means), others) if others else None
    return Difference(centre, over_seeds, over_tasks)


def _errors(centre: float, variance: float, freedom: int) -> Errors | None:
    """A number in standard errors; None where there is no spread."""
    error = math.sqrt(variance)
    if error < _NO_SPREAD:
        return None
    return Errors(centre / error, float(2 * stats.t.sf(math.fabs(centre / error), freedom)), error)
