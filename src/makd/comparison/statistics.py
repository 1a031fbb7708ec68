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
    overall: Errors | None
    """The spread is that of all pairs: the question is about tasks like these. None where pairs do not differ."""
    within: Errors | None
    """The spread is that of the seeds of each task, pooled: the question is about these very tasks, and what a method
    gains may differ between them. None where each task has one pair, or its pairs do not differ."""


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
    """What `pairs` say together; None of none."""
    if not gains:
        return None
    centre = sum(gains.values()) / len(gains)
    by_task: dict[str, list[float]] = {}
    for (task, _seed), value in gains.items():
        by_task.setdefault(task, []).append(value)
    overall, within = _errors(centre, [list(gains.values())]), _errors(centre, list(by_task.values()))
    return Difference(centre, overall, within)


def _errors(centre: float, groups: Sequence[Sequence[float]]) -> Errors | None:
    """The mean of all numbers, whose spread around the means of their groups is the same in each."""
    count = sum(map(len, groups))
    freedom = count - len(groups)
    if freedom == 0:
        return None
    squares = sum((value - sum(group) / len(group)) ** 2 for group in groups for value in group)
    spread = math.sqrt(squares / freedom / count)
    if spread < _NO_SPREAD:
        return None
    return Errors(centre / spread, float(2 * stats.t.sf(math.fabs(centre / spread), freedom)), spread)
