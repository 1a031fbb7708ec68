"""Station 3: from a budget to the rank of every linear, exactly.

A rule says which rank each linear has at a given share; the share is what the budget leaves; what rounding leaves over
is spent so that the total meets the budget to within one rank step of the smallest linear.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from makd.errors import BudgetError
from makd.registry import Registry


@dataclass(frozen=True)
class LinearSize:
    """What allocation knows of a linear."""

    name: str
    out_features: int
    in_features: int
    has_bias: bool

    @property
    def dense(self) -> int:
        """Weights of the matrix."""
        return self.out_features * self.in_features

    @property
    def step(self) -> int:
        """Weights of one rank."""
        return self.out_features + self.in_features

    @property
    def break_even(self) -> int:
        """Largest rank at which the factors have fewer weights than the matrix; 0 for a single row or column."""
        return (self.dense - 1) // self.step

    def weights(self, rank: int | None) -> int:
        """Weights at this rank; None is dense."""
        return self.dense if rank is None else rank * self.step

    def parameters(self, rank: int | None) -> int:
        """Weights and bias at this rank; None is dense."""
        return self.weights(rank) + (self.out_features if self.has_bias else 0)


@dataclass(frozen=True)
class RankPlan:
    """The rank of every linear; None where it stays dense."""

    ranks: Mapping[str, int | None]
    parameters: int
    """Of all these linears, weights and biases."""


Rule = Callable[[LinearSize, Tensor | None, float], float]
"""(linear, its singular values, a share in [0, 1]) -> rank, not rounded. Grows with the share; all of it at 1."""


def _uniform(size: LinearSize, _spectrum: Tensor | None, share: float) -> float:
    return share * size.dense / size.step


def _energy(size: LinearSize, spectrum: Tensor | None, share: float) -> float:
    if spectrum is None:
        raise ValueError("The energy rule needs the singular values of every linear.")
    if share >= 1:
        return size.dense / size.step
    energy = spectrum.square().cumsum(0)
    return float(torch.searchsorted(energy, share * energy[-1])) + 1


def _global(size: LinearSize, spectrum: Tensor | None, share: float) -> float:
    if spectrum is None:
        raise ValueError("The global rule needs the singular values of every linear.")
    if share >= 1:
        return size.dense / size.step
    # one price for a parameter everywhere: a component is kept if it is worth more than its weights cost. The price
    # falls from e^60 to e^-60 as the share grows, so every budget has one
    price = torch.exp(torch.tensor(60.0 - 120.0 * share, dtype=torch.float64))
    return float((spectrum.double().square() > price * size.step).sum())


RANK_RULES: Registry[Rule] = Registry("rank rule", {"uniform": _uniform, "energy": _energy, "global": _global})
"""`uniform`: every linear keeps the same share of its weights. `energy`: every linear keeps the same share of the
squared singular values in its solver's norm. `global`: the components of all linears that are worth most a weight, by
squared singular values; makes sense only where these are in one unit, as those of the two-sided solvers are."""


def allocate(
    sizes: Sequence[LinearSize],
    allowance: int,
    rule: str = "uniform",
    spectra: Mapping[str, Tensor] | None = None,
    rank_multiple: int = 8,
) -> RankPlan:
    """Ranks with at most `allowance` parameters (weights and biases) in all of `sizes` together.

    The total is never above the allowance. It is less than one rank step (out + in) of the smallest linear below it, as
    long as that linear has at least as many weights as two rank steps of any other; all linears dense is the other end.
    Ranks are multiples of `rank_multiple`, or below the first one, but for one linear of the smallest size, which takes
    up the rest. A linear whose rank would reach break-even stays dense.

    Raises:
        BudgetError: rank 1 everywhere is more than the allowance.
        UnknownNameError: no rule is called so.
    """
    chosen = RANK_RULES[rule]
    spectra = spectra or {}
    biases = sum(size.parameters(None) - size.dense for size in sizes)
    available = allowance - biases
    smallest = sum(size.weights(_cap(size, 1)) for size in sizes)
    if available < smallest:
        raise BudgetError(
            f"The linears may have {allowance:,} parameters; with rank 1 everywhere they have {smallest + biases:,}, "
            "the smallest possible student. Give a larger budget."
        )

    def ranks_at(share: float) -> list[int | None]:
        return [_round(size, chosen(size, spectra.get(size.name), share), rank_multiple) for size in sizes]

    share = _largest_share(lambda value: _total(sizes, ranks_at(value)) <= available)
    ranks = ranks_at(share)
    wanted = [chosen(size, spectra.get(size.name), share) for size in sizes]
    _grow_(ranks, sizes, wanted, available, rank_multiple)
    _fill_(ranks, sizes, available)
    plan = {size.name: rank for size, rank in zip(sizes, ranks, strict=True)}
    return RankPlan(plan, _total(sizes, ranks) + biases)


def _cap(size: LinearSize, rank: int) -> int | None:
    """`rank`, or None for dense from break-even on."""
    return rank if rank <= size.break_even else None


def _round(size: LinearSize, wanted: float, multiple: int) -> int | None:
    rank = int(wanted + 1e-9)
    if rank > size.break_even:
        return None
    return max(1, rank // multiple * multiple if rank >= multiple else rank)


def _total(sizes: Sequence[LinearSize], ranks: Sequence[int | None]) -> int:
    return sum(size.weights(rank) for size, rank in zip(sizes, ranks, strict=True))


def _largest_share(fits: Callable[[float], bool]) -> float:
    """Largest share in [0, 1] that fits, by bisection."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _grow_(
    ranks: list[int | None], sizes: Sequence[LinearSize], wanted: Sequence[float], available: int, multiple: int
) -> None:
    """Spend what rounding down left, one multiple at a time, first where rounding took the largest share of a rank."""
    rest = available - _total(sizes, ranks)
    order = sorted(range(len(sizes)), key=lambda index: (wanted[index] - (ranks[index] or 0)) / max(wanted[index], 1))
    for index in reversed(order):
        size, rank = sizes[index], ranks[index]
        if rank is None:
            continue
        larger = _cap(size, rank // multiple * multiple + multiple)
        cost = size.weights(larger) - size.weights(rank)
        if cost <= rest:
            ranks[index] = larger
            rest -= cost


def _fill_(ranks: list[int | None], sizes: Sequence[LinearSize], available: int) -> None:
    """Let one linear of the smallest step take up the rest of the budget; where it is full, others grow at its cost."""
    filler = min(range(len(sizes)), key=lambda index: (sizes[index].step, ranks[index] is None, -index))
    size = sizes[filler]
    growing = sorted((index for index in range(len(sizes)) if index != filler), key=lambda index: sizes[index].step)
    for index in (None, *growing):
        while True:
            if index is not None:
                rank = ranks[index]
                if rank is None:
                    break
                ranks[index] = _cap(sizes[index], rank + 1)
            room = available - _total(sizes, ranks) + size.weights(ranks[filler])
            best = None if room >= size.dense else min(room // size.step, size.break_even)
            if best is not None and best < 1:
                if index is not None:
                    ranks[index] = rank  # it does not pay for this one
                break
            ranks[filler] = best
            if room - size.weights(best) < size.step:
                return
            if index is None:
                break
