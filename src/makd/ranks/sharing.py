"""Station 3: which linears that read the same input get one A, at the same budget.

A group as one linear, with its weights one below the other, costs rank · (in + all out); its linears apart cost the sum
of rank · (in + out). Which loses less is read off the spectra of both.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import Tensor

from makd.anatomy import Anatomy
from makd.ranks.allocation import Ladder, LinearSize, Numbers, RankPlan
from makd.ranks.steps import RankSteps
from makd.solvers.factors import Spectrum

SHARE_INPUT_CHOICES = ("auto", "never", "always")
CLEARLY = 0.003
"""By how much, relatively, sharing must be better than not, error and price of the weights together: predictions are
not closer than that. What that was chosen by stands in docs/explanation/method.md."""


@dataclass(frozen=True)
class InputGroup:
    """Linears that read the same input, and may be factored as one."""

    linears: tuple[str, ...]

    @property
    def name(self) -> str:
        """What rank allocation calls the group as one linear."""
        return " + ".join(self.linears)

    def size(self, known: Mapping[str, LinearSize]) -> LinearSize:
        """The group as one linear."""
        first = known[self.linears[0]]
        out_features = sum(known[name].out_features for name in self.linears)
        return LinearSize(self.name, out_features, first.in_features, first.has_bias)


@dataclass(frozen=True)
class SharedStack:
    """A stack of experts' matrices of which one factor may be the same for all experts."""

    stack: str
    side: Literal["reduce", "expand"]
    """A or B."""

    @property
    def linears(self) -> tuple[str, ...]:
        """The stack, as rank allocation calls it where each expert has both factors for itself."""
        return (self.stack,)

    @property
    def name(self) -> str:
        """What rank allocation calls the stack with one factor for all."""
        return f"{self.stack} + one {'A' if self.side == 'reduce' else 'B'}"

    def size(self, known: Mapping[str, LinearSize]) -> LinearSize:
        """The stack with one factor for all."""
        return replace(known[self.stack], name=self.name, shared=self.side)


Group = InputGroup | SharedStack
"""What may share a factor."""


@dataclass(frozen=True)
class SharedInput:
    """What was found of one group of linears that read the same input."""

    linears: tuple[str, ...]
    shared: bool
    """Whether they got one A."""
    separate: float | None = None
    """Predicted squared error of the linears apart, in the solver's norm; for ranks `global` plus their weights at what
    a weight is worth at this budget. None where nothing was compared."""
    together: float | None = None
    """The same with one A; at the same number of weights, or the same price a weight."""
    side: Literal["reduce", "expand"] = "reduce"
    """Which factor it is about; B only of a stack of experts."""


def find_groups(anatomy: Anatomy, sizes: Iterable[LinearSize]) -> tuple[InputGroup, ...]:
    """The groups that may share one A: of linears that all get factors, and all have a bias or none."""
    known = {size.name: size for size in sizes}
    return tuple(
        InputGroup(group)
        for group in anatomy.input_groups
        if all(name in known for name in group) and len({known[name].has_bias for name in group}) == 1
    )


def find_sharing(anatomy: Anatomy, sizes: Sequence[LinearSize], choice: str) -> tuple[Group, ...]:
    """What may share a factor with the setting `share_input`; with `always`, experts share A."""
    if choice == "never":
        return ()
    sides: tuple[Literal["reduce", "expand"], ...] = ("reduce", "expand") if choice == "auto" else ("reduce",)
    known = {size.name for size in sizes}
    stacks = (SharedStack(stack.name, side) for stack in anatomy.stacks if stack.name in known for side in sides)
    return (*find_groups(anatomy, sizes), *stacks)


def with_groups(sizes: Sequence[LinearSize], groups: Iterable[Group]) -> list[LinearSize]:
    """`sizes` with each group as one linear, where its first linear stood; each linear is in one group at most."""
    known = {size.name: size for size in sizes}
    firsts = {group.linears[0]: group for group in groups}
    inside = {name for group in firsts.values() for name in group.linears}
    grouped = []
    for size in sizes:
        if size.name in firsts:
            grouped.append(firsts[size.name].size(known))
        elif size.name not in inside:
            grouped.append(size)
    return grouped


def all_sizes(sizes: Sequence[LinearSize], groups: Iterable[Group]) -> dict[str, LinearSize]:
    """Linears and groups by their names."""
    known = {size.name: size for size in sizes}
    return known | {group.name: group.size(known) for group in groups}


def by_linear(plan: RankPlan, groups: Iterable[Group]) -> RankPlan:
    """The plan of `with_groups` in terms of linears: each has its group's rank, and the parameters count A once."""
    names = {group.name: group.linears for group in groups}
    ranks = {name: rank for item, rank in plan.ranks.items() for name in names.get(item, (item,))}
    return RankPlan(ranks, plan.parameters)


def compare_at_one_price(
    sizes: Sequence[LinearSize],
    groups: Sequence[Group],
    available: int,
    spectra: Mapping[str, Tensor],
    sensitivities: Mapping[str, float],
    rank_multiple: int | None,
) -> list[SharedInput]:
    """For each group, error plus price of its weights at its best ranks, apart and as one.

    The price of a weight is the Lagrange multiplier of the budget: the one at which all linears together, each group
    the better way, have `available` weights.

    Args:
        sizes: of the linears.
        groups: that may share.
        available: weights of all `sizes` together, biases not counted.
        spectra: singular values of each linear, and of each group by its name.
        sensitivities: linear -> what one unit of its energy is worth; 1 where none is given.
        rank_multiple: as `allocate` takes it.
    """
    of_all = {group.name: sensitivities.get(group.linears[0], 1.0) for group in groups} | dict(sensitivities)
    ladders = {
        size.name: _ladder(size, spectra[size.name], of_all.get(size.name, 1.0), rank_multiple)
        for size in all_sizes(sizes, groups).values()
    }
    grouped = {name for group in groups for name in group.linears}
    ways: list[list[list[Ladder]]]
    ways = [[[ladders[size.name]]] for size in sizes if size.name not in grouped]
    for linears in dict.fromkeys(group.linears for group in groups):
        together = [[ladders[group.name]] for group in groups if group.linears == linears]
        ways.append([[ladders[name] for name in linears], *together])
    low, high = 1e-40, 1e20
    for _ in range(200):
        price = (low * high) ** 0.5
        weights = 0.0
        for options in ways:
            weights += min(_cheapest(option, price) for option in options)[1]
        low, high = (price, high) if weights > available else (low, price)
    return [
        _judged(group, _cheapest([ladders[name] for name in group.linears], high)[0],
                _cheapest([ladders[group.name]], high)[0])
        for group in groups
    ]  # fmt: skip


def equal_ranks(
    sizes: Sequence[LinearSize], groups: Sequence[Group], ranks: Mapping[str, int | None], rank_multiple: int | None
) -> dict[str, int | None]:
    """Group's name -> its largest rank with no more weights than its linears have apart; None where that is dense.

    With a `rank_multiple` it is one; None where there is no such rank.
    """
    steps = RankSteps.of(rank_multiple)
    known = all_sizes(sizes, groups)
    found = {}
    for group in groups:
        weights = sum(known[name].weights(ranks[name]) for name in group.linears)
        rank = known[group.name].capped(weights // known[group.name].step)
        found[group.name] = None if rank is None else steps.rounded(rank) or None
    return found


def compare_at_equal_weights(
    groups: Iterable[Group], ranks: Mapping[str, int | None], spectra: Mapping[str, Spectrum]
) -> list[SharedInput]:
    """For each group, its error apart and as one, at `ranks` (`equal_ranks`); dense groups have nothing to share."""

    def lost(name: str) -> float:
        rank = ranks[name]
        return 0.0 if rank is None else spectra[name].squared_error(rank)

    return [
        SharedInput(group.linears, False, side=_side(group))
        if ranks[group.name] is None
        else _judged(group, sum(lost(name) for name in group.linears), lost(group.name))
        for group in groups
    ]


def plan_error(plan: RankPlan, spectra: Mapping[str, Tensor], sensitivities: Mapping[str, float]) -> float:
    """Predicted error of all linears and groups of a plan, by their names in it."""
    return sum(
        sensitivities.get(name.split(" + ")[0], 1.0) * _lost(spectra[name], rank) for name, rank in plan.ranks.items()
    )


def _judged(group: Group, separate: float, together: float) -> SharedInput:
    return SharedInput(group.linears, together < separate * (1 - CLEARLY), separate, together, _side(group))


def _side(group: Group) -> Literal["reduce", "expand"]:
    return group.side if isinstance(group, SharedStack) else "reduce"


def best_of_each(found: Sequence[SharedInput]) -> list[SharedInput]:
    """`found`, with one way at most shared of those of the same linears: the one that loses least."""
    best: dict[tuple[str, ...], SharedInput] = {}
    for one in found:
        other = best.get(one.linears)
        if one.shared and (other is None or (one.together or 0.0) < (other.together or 0.0)):
            best[one.linears] = one
    return [replace(one, shared=one.shared and best[one.linears] is one) for one in found]


def _lost(spectrum: Tensor, rank: int | None) -> float:
    return 0.0 if rank is None else float(spectrum[rank:].double().square().sum())


def units_of(linears: Sequence[str], shared: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """What of `linears` is factored as one: first those of them that share one A, then each of the others alone."""
    together = [unit for unit in shared if set(unit) <= set(linears)]
    inside = {name for unit in together for name in unit}
    return [*together, *((name,) for name in linears if name not in inside)]


def _ladder(size: LinearSize, spectrum: Tensor, sensitivity: float, rank_multiple: int | None) -> Ladder:
    energies: Numbers = np.sort(spectrum.detach().double().cpu().numpy() ** 2 * sensitivity)[::-1]
    return Ladder.of(size, energies, RankSteps.of(rank_multiple))


def _cheapest(ladders: Iterable[Ladder], price: float) -> tuple[float, float]:
    """Error plus price of the weights at the best ranks, and those weights."""
    value = weights = 0.0
    for ladder in ladders:
        values = ladder.kept[-1] - ladder.kept + price * ladder.weights
        rung = int(np.argmin(values))
        value, weights = value + float(values[rung]), weights + float(ladder.weights[rung])
    return value, weights
