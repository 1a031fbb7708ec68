"""Station 3: from a budget to the rank of every linear, exactly.

Every linear climbs a ladder of ranks, from the smallest over the multiples that hardware likes to dense. A rule says
which linear climbs next; climbing goes on while the budget allows; single ranks of one linear take up the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix
from torch import Tensor

from makd.errors import BudgetError, NumericsError
from makd.ranks.steps import RankSteps
from makd.registry import Registry

OPTIMAL_RUNGS = 10_000
"""Ranks to choose from, over all linears, up to which `global` looks for the optimum itself."""

Numbers = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LinearSize:
    """What allocation knows of a linear, or of as many as there are experts, which have one rank."""

    name: str
    out_features: int
    in_features: int
    has_bias: bool
    experts: int = 1
    """How many matrices there are."""
    shared: Literal["", "reduce", "expand"] = ""
    """Which of their factors is one for all of them: A (`reduce`), B (`expand`) or none."""

    @property
    def dense(self) -> int:
        """Weights of the matrix, or of all matrices."""
        return self.experts * self.out_features * self.in_features

    @property
    def step(self) -> int:
        """Weights of one rank."""
        out = self.out_features * (1 if self.shared == "expand" else self.experts)
        return out + self.in_features * (1 if self.shared == "reduce" else self.experts)

    @property
    def break_even(self) -> int:
        """Largest rank at which the factors have fewer weights than the matrix; 0 for one row or one column."""
        return (self.dense - 1) // self.step

    def weights(self, rank: int | None) -> int:
        """Weights at this rank; None is dense."""
        return self.dense if rank is None else rank * self.step

    def parameters(self, rank: int | None) -> int:
        """Weights and bias at this rank; None is dense."""
        return self.weights(rank) + (self.experts * self.out_features if self.has_bias else 0)

    def capped(self, rank: int) -> int | None:
        """`rank`, or None for dense from break-even on."""
        return rank if rank <= self.break_even else None


@dataclass(frozen=True)
class RankPlan:
    """The rank of every linear; None where it stays dense."""

    ranks: Mapping[str, int | None]
    parameters: int
    """Of all these linears, weights and biases."""


@dataclass(frozen=True)
class Ladder:
    """The ranks that a linear may have, ascending, and what each costs and keeps. The last rung is dense."""

    size: LinearSize
    ranks: tuple[int | None, ...]
    weights: Counts
    """Weights at each rung, ascending."""
    kept: Numbers
    """Energy (sum of squared singular values, times the sensitivity) at each rung; zeros without a spectrum."""

    @staticmethod
    def of(size: LinearSize, energies: Numbers, steps: RankSteps) -> "Ladder":
        """The ladder of one linear; `energies` are those of its terms, descending."""
        factored = np.array(steps.up_to(size.break_even), dtype=np.int64)
        total = np.concatenate([[0.0], energies.cumsum()])
        return Ladder(
            size,
            (*(int(rank) for rank in factored), None),
            np.concatenate([factored * size.step, [size.dense]]),
            np.concatenate([total[np.minimum(factored, len(energies))], total[-1:]]),
        )

    @property
    def gain(self) -> Numbers:
        """Energy per weight of each climb from a rung to the next."""
        return np.diff(self.kept) / np.diff(self.weights)


Climbs = tuple[Counts, Numbers]
"""The rungs that a linear climbs to, in order, and how urgent each climb is: less from climb to climb."""


@dataclass(frozen=True)
class RankRule:
    """How a budget is spread over linears."""

    summary: str
    climbs: Callable[[Ladder], Climbs]
    needs_spectra: bool


def _uniform(ladder: Ladder) -> Climbs:
    return np.arange(1, len(ladder.weights)), -ladder.weights[:-1] / ladder.size.dense


def _energy(ladder: Ladder) -> Climbs:
    total = ladder.kept[-1]
    kept = ladder.kept[:-1] / total if total > 0 else np.ones(len(ladder.kept) - 1)  # nothing is all of nothing
    return np.arange(1, len(ladder.kept)), -kept


def _global(ladder: Ladder) -> Climbs:
    # Terms are worth less and less, but the last climb, to dense, brings all the terms beyond break-even for at most
    # one step's weights. So from the rung on from which dense is the better bargain, the climb goes there directly.
    if len(ladder.ranks) == 1:
        return np.arange(0), np.zeros(0)
    to_dense = (ladder.kept[-1] - ladder.kept[:-1]) / (ladder.weights[-1] - ladder.weights[:-1])
    gain = ladder.gain
    direct = int(np.argmax(to_dense >= gain))  # true at the last rung, where they are the same climb
    rungs = np.concatenate([np.arange(1, direct + 1), [len(gain)]])
    return rungs, np.concatenate([gain[:direct], to_dense[direct : direct + 1]])


RANK_RULES: Registry[RankRule] = Registry(
    "rank rule",
    {
        "uniform": RankRule("every linear keeps the same share of its weights", _uniform, False),
        "energy": RankRule("every linear keeps the same share of its squared singular values", _energy, True),
        "global": RankRule("the largest gain (squared singular value times sensitivity) a parameter", _global, True),
    },
)


def smallest_parameters(sizes: Sequence[LinearSize], lowest: int = 1) -> int:
    """Parameters (weights and biases) of `sizes` with rank `lowest` everywhere, dense where that is no smaller."""
    return sum(size.parameters(size.capped(lowest)) for size in sizes)


def allocate(
    sizes: Sequence[LinearSize],
    allowance: int,
    rule: str = "uniform",
    spectra: Mapping[str, Tensor] | None = None,
    rank_multiple: int | None = None,
    sensitivities: Mapping[str, float] | None = None,
) -> RankPlan:
    """Ranks with at most `allowance` parameters (weights and biases) in all of `sizes` together.

    How close the total comes: let f be the largest of those linears that can be factored and have the smallest step
    (out + in). The total is less than that step below the allowance, or everything is dense, if f can make room for
    one step of any other: dense weights of f >= step of the other + weights of f at the lowest rank. Proof: while
    one of the smallest step is factored, it can take steps itself. If all are dense and a step's worth is left,
    another linear takes a rank, and f goes down to the highest rank that leaves room for that; f's weights change
    in steps no larger than its own. Real models' linears are so; for others, what is left is less than any linear's
    next rank costs.

    With a `rank_multiple` every rank is a multiple of it: a step is as many ranks then, in the above too, and what is
    less than a step is given up. With None ranks are multiples of 8 as far as possible, then the rest is spent in
    single ranks of as few linears as possible: typically one linear ends up off the multiple, and never more than
    three; ranks below 8 are free. A linear whose rank passes break-even stays dense (None).

    Args:
        sizes: of all factorizable linears.
        allowance: parameters.
        rule: one of `RANK_RULES`. `global` never keeps less energy than `uniform`: where rounding would make it so, it
            is `uniform`. Of up to `OPTIMAL_RUNGS` ranks to choose from it keeps what is best, to within 1e-4.
        spectra: name -> singular values, descending, in units that the linears share. Terms that are missing count 0.
        rank_multiple: at least 1, or None.
        sensitivities: name -> what one unit of a linear's energy is worth, at least 0; 1 where none is given. The
            same for all terms of a linear, so only `global` looks at them.

    Raises:
        BudgetError: the lowest rank everywhere is more than the allowance.
        NumericsError: a spectrum or sensitivity is not finite, or negative.
        UnknownNameError: no rule is called so.
        ValueError: spectra are missing for a rule that needs them, names repeat, or a number is below 1.
    """
    chosen = RANK_RULES[rule]
    _check(sizes, rank_multiple)
    steps = RankSteps.of(rank_multiple)
    smallest = smallest_parameters(sizes, steps.lowest)
    if allowance < smallest:
        raise BudgetError(
            f"The linears may have {allowance:,} parameters; with rank {steps.lowest} everywhere they have "
            f"{smallest:,}, the smallest possible student. Give a larger budget."
        )
    spectra, sensitivities = spectra or {}, sensitivities or {}
    ladders = []
    for size in sizes:
        if chosen.needs_spectra and size.name not in spectra:
            raise ValueError(f"The {rule} rule needs the singular values of every linear; {size.name} has none.")
        spectrum = spectra[size.name] if chosen.needs_spectra else None
        energies = _energies(size, spectrum, sensitivities.get(size.name, 1.0))
        ladders.append(Ladder.of(size, energies, steps))
    available = allowance - sum(size.parameters(None) - size.dense for size in sizes)
    ranks = _ranks(ladders, chosen, available, steps)
    if rule == "global":
        # climbing by gain is greedy: in small tables, what does not fit at the end may turn the balance
        others = [_ranks(ladders, RANK_RULES["uniform"], available, steps)]
        others += _optimal_ranks(ladders, chosen, available, steps)
        ranks = max(ranks, *others, key=lambda plan: _kept(sizes, plan, spectra, sensitivities))
    plan = {size.name: rank for size, rank in zip(sizes, ranks, strict=True)}
    return RankPlan(plan, sum(size.parameters(plan[size.name]) for size in sizes))


def _check(sizes: Sequence[LinearSize], rank_multiple: int | None) -> None:
    if rank_multiple is not None and rank_multiple < 1:
        raise ValueError(f"rank_multiple is at least 1, or None; got {rank_multiple}.")
    if len({size.name for size in sizes}) < len(sizes):
        raise ValueError("Two linears have the same name.")


def _energies(size: LinearSize, spectrum: Tensor | None, sensitivity: float) -> Numbers:
    if spectrum is None:
        return np.zeros(0)
    energies: Numbers = np.sort(spectrum.detach().double().cpu().numpy() ** 2 * sensitivity)[::-1]
    if not np.isfinite(energies).all() or sensitivity < 0:
        raise NumericsError(
            f"The singular values of {size.name}, or its sensitivity ({sensitivity}), are not finite and at least 0. "
            "Check the weights and the calibration text."
        )
    return energies


def _kept(
    sizes: Sequence[LinearSize],
    ranks: Sequence[int | None],
    spectra: Mapping[str, Tensor],
    sensitivities: Mapping[str, float],
) -> float:
    return sum(
        float(_energies(size, spectra[size.name], sensitivities.get(size.name, 1.0))[:rank].sum())
        for size, rank in zip(sizes, ranks, strict=True)
    )


def _optimal_ranks(
    ladders: Sequence[Ladder], rule: RankRule, available: int, steps: RankSteps
) -> list[list[int | None]]:
    """The rungs that keep most energy of all, as a list of one; of none for tables where that would take long.

    Choose one rung of each ladder, with the weights together within `available`: a multiple-choice knapsack, which
    scipy's mixed-integer solver (HiGHS) gives to within 1e-4. In larger tables a single climb is so small a part of the
    budget that greedy loses nothing: 224 linears of Llama-7B's shapes, 8e-5 at most.
    """
    ends = np.cumsum([len(ladder.ranks) for ladder in ladders])
    total = sum(float(ladder.kept[-1]) for ladder in ladders)
    if ends[-1] > OPTIMAL_RUNGS or total <= 0:
        return []
    one_each = csr_matrix((np.ones(ends[-1]), np.arange(ends[-1]), np.concatenate([[0], ends])))
    weights = np.concatenate([ladder.weights for ladder in ladders])
    found = milp(
        -np.concatenate([ladder.kept for ladder in ladders]) / total,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weights[None] / available, -np.inf, 1)],
        integrality=np.ones(ends[-1]),
        bounds=Bounds(0, 1),
        # by nodes and not by seconds, so that a slower or busier machine has the same ranks; one node was enough for
        # every real model's table that was tried, in less than a second
        options={"mip_rel_gap": 1e-4, "node_limit": 1000},
    )
    if found.x is None:
        return []
    rungs = np.array([int(part.argmax()) for part in np.split(found.x, ends[:-1])], dtype=np.int64)
    rest = available - sum(int(ladder.weights[rung]) for ladder, rung in zip(ladders, rungs, strict=True))
    return [_ranks(ladders, rule, rest, steps, rungs)] if rest >= 0 else []


def _ranks(
    ladders: Sequence[Ladder], rule: RankRule, available: int, steps: RankSteps, start: Counts | None = None
) -> list[int | None]:
    """Ranks from climbing as `rule` says. With `start` from those rungs, and `available` is what they leave."""
    if start is None:
        rungs = np.zeros(len(ladders), dtype=np.int64)
        rest = available - sum(int(ladder.weights[0]) for ladder in ladders)
    else:
        rungs, rest = start.copy(), available
    rest = _climb_(rungs, ladders, [rule.climbs(ladder) for ladder in ladders], rest)
    # a rule may climb several rungs at once; what is left is spent on single ones
    single = [_single_urgency(ladder, rule) for ladder in ladders]
    rest = _climb_(rungs, ladders, [(np.arange(1, len(urgency) + 1), urgency) for urgency in single], rest)
    ranks = [ladder.ranks[rung] for ladder, rung in zip(ladders, rungs, strict=True)]
    urgency = [float(one[rung]) if rung < len(one) else 0.0 for one, rung in zip(single, rungs, strict=True)]
    _fill_(ranks, [ladder.size for ladder in ladders], urgency, rest, steps)
    return ranks


def _single_urgency(ladder: Ladder, rule: RankRule) -> Numbers:
    rungs, urgency = rule.climbs(ladder)
    return urgency if len(rungs) == len(ladder.weights) - 1 else ladder.gain


def _climb_(rungs: Counts, ladders: Sequence[Ladder], climbs: Sequence[Climbs], rest: int) -> int:
    """Climb, the most urgent first, until no linear's next climb fits in `rest`; returns what is left of it."""
    owners, goals, costs, urgencies = [], [], [], []
    for index, (ladder, (goal, urgency)) in enumerate(zip(ladders, climbs, strict=True)):
        ahead = goal > rungs[index]
        goal = goal[ahead]
        costs.append(np.diff(ladder.weights[np.concatenate([rungs[index : index + 1], goal])]))
        owners.append(np.full(len(goal), index))
        goals.append(goal)
        # rounding must not let a linear's later climb go before an earlier one
        urgencies.append(np.minimum.accumulate(urgency[ahead]))
    order = np.argsort(-np.concatenate(urgencies), kind="stable")  # stable: a linear's own climbs stay in order
    owner, goal, cost = (np.concatenate(parts)[order] for parts in (owners, goals, costs))
    fitting = int(np.searchsorted(cost.cumsum(), rest, side="right"))
    np.maximum.at(rungs, owner[:fitting], goal[:fitting])
    rest -= int(cost[:fitting].sum())
    open_ = set(owner[fitting:].tolist())
    for index, rung, price in zip(
        owner[fitting:].tolist(), goal[fitting:].tolist(), cost[fitting:].tolist(), strict=True
    ):
        if not open_:
            break
        if index not in open_:
            continue
        if price <= rest:
            rungs[index] = rung
            rest -= price
        else:
            open_.discard(index)
    return rest


def _fill_(
    ranks: list[int | None], sizes: Sequence[LinearSize], urgency: Sequence[float], rest: int, steps: RankSteps
) -> None:
    """Spend `rest` on the smallest steps; `allocate` says how close that comes, and why."""
    factorable = [index for index, size in enumerate(sizes) if size.break_even >= steps.lowest]
    order = sorted(factorable, key=lambda index: (sizes[index].step, -urgency[index]))
    for index in order:
        rest = _raise_(ranks, sizes[index], index, rest, steps)
    growing = [index for index in factorable if ranks[index] is not None]
    step = min((sizes[index].step for index in factorable), default=0)
    if not growing or rest < step * steps.fill:
        return
    # the smallest are all dense: the largest of them makes room for one step of the linear that needs least
    giver = max((index for index in factorable if sizes[index].step == step), key=lambda index: sizes[index].dense)
    costs = ((index, _next_cost(sizes[index], ranks[index], steps)) for index in growing)
    taker, cost = min(costs, key=lambda pair: pair[1])
    room = sizes[giver].dense + rest - cost
    if room >= sizes[giver].weights(steps.lowest):
        ranks[taker] = sizes[taker].capped((ranks[taker] or 0) + steps.fill)
        ranks[giver] = steps.rounded(min(room // step, sizes[giver].break_even))
        rest = room - sizes[giver].weights(ranks[giver])
        for index in order:  # less than a step is left, but the last one, to dense, may cost as little as one weight
            rest = _raise_(ranks, sizes[index], index, rest, steps)


def _next_cost(size: LinearSize, rank: int | None, steps: RankSteps) -> int:
    return size.weights(size.capped((rank or 0) + steps.fill)) - size.weights(rank)


def _raise_(ranks: list[int | None], size: LinearSize, index: int, rest: int, steps: RankSteps) -> int:
    """The smallest steps of one linear, while `rest` allows; returns what is left of it."""
    rank = ranks[index]
    if rank is None:
        return rest
    room = rest + size.weights(rank)
    best = None if room >= size.dense else steps.rounded(min(room // size.step, size.break_even))
    ranks[index] = best
    return room - size.weights(best)
