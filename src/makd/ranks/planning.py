"""Station 3: ranks under the budget, and which linears share one A.

sizes, spectra -> ranks, each linear apart -> groups that lose less as one -> ranks again, with those
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from makd.ranks.allocation import RANK_RULES, LinearSize, RankPlan, allocate
from makd.ranks.sharing import (
    Group,
    SharedInput,
    SharedStack,
    all_sizes,
    best_of_each,
    by_linear,
    compare_at_equal_weights,
    compare_at_one_price,
    equal_ranks,
    plan_error,
    with_groups,
)
from makd.ranks.steps import RankSteps
from makd.solvers.factors import Decomposition, Spectrum

ReadSpectra = Callable[[Iterable[str]], Mapping[str, Spectrum]]
"""Names of linears and groups -> their spectra."""


@dataclass(frozen=True)
class RankProblem:
    """What ranks are looked for."""

    sizes: Sequence[LinearSize]
    """Of everything that gets factors, vocabulary too."""
    allowance: int
    """Parameters that all of it may have."""
    rule: str
    """One of `RANK_RULES`."""
    rank_multiple: int | None
    """As `allocate` takes it."""
    sensitivities: Mapping[str, float]
    """Linear -> what one unit of its energy is worth; 1 where none is given."""
    share_input: str
    """auto, never or always."""
    tables: Mapping[str, Decomposition]
    """Of the vocabulary."""
    max_ranks: Mapping[str, int] | None = None
    """Linear, or group by its name -> the largest rank that there are factors for; None for any."""


@dataclass(frozen=True)
class RankAssignment:
    """A rank for every linear or group, and which of them share one A."""

    items: RankPlan
    """By linear, or by group where one A is shared."""
    groups: tuple[Group, ...] = ()
    """Those that share one A."""
    found: tuple[SharedInput, ...] = ()
    """What was found of every group."""

    @property
    def plan(self) -> RankPlan:
        """By linear."""
        return by_linear(self.items, self.groups)

    def linears_of(self, item: str) -> tuple[str, ...]:
        """The linears that `item` of `items` stands for: those of a group, or the one of that name."""
        return next((group.linears for group in self.groups if group.name == item), (item,))


def find_max_ranks(problem: RankProblem, groups: Sequence[Group]) -> dict[str, int] | None:
    """Ranks that no linear or group gets above, whatever shares one A; None for rules that need whole spectra first.

    Ranks that do not follow from spectra are known before anything is decomposed, but for what groups that share
    leave to the others: that is a few ranks, for which there is room here.
    """
    if RANK_RULES[problem.rule].needs_spectra:
        return None
    apart = _allocated(problem, problem.sizes, {}).ranks
    plans = [apart, equal_ranks(problem.sizes, groups, apart, problem.rank_multiple)]
    for side in ("reduce", "expand"):
        chosen = [group for group in groups if not isinstance(group, SharedStack) or group.side == side]
        if chosen:
            plans.append(_allocated(problem, with_groups(problem.sizes, chosen), {}).ranks)
    known, steps = all_sizes(problem.sizes, groups), RankSteps.of(problem.rank_multiple)
    max_ranks: dict[str, int] = {}
    for name, size in known.items():
        ranks = [plan[name] for plan in plans if name in plan]
        if any(rank is not None for rank in ranks):
            highest = size.break_even if None in ranks else max(rank for rank in ranks if rank is not None)
            max_ranks[name] = steps.rounded(min(size.break_even, highest + 2 * steps.multiple))
        else:
            max_ranks[name] = 0
    return max_ranks


def plan_ranks(problem: RankProblem, groups: Sequence[Group], read_spectra: ReadSpectra) -> RankAssignment:
    """Ranks within the allowance; with share_input auto, groups share where the predicted error is then smaller.

    Args:
        problem: sizes, budget and settings.
        groups: of linears that may share; none, if they never shall.
        read_spectra: gives those of linears and groups by their names.

    Raises:
        BudgetError, NumericsError: as `allocate`.
    """
    if problem.share_input == "always" and groups:
        plan = _plan(problem, with_groups(problem.sizes, groups), read_spectra)
        return RankAssignment(plan, tuple(groups), tuple(SharedInput(group.linears, True) for group in groups))
    apart = _plan(problem, problem.sizes, read_spectra)
    if not groups:
        return RankAssignment(apart)
    found = best_of_each(_compared(problem, groups, apart, read_spectra))
    winners = tuple(group for group, one in zip(groups, found, strict=True) if one.shared)
    if winners:
        shared = _plan(problem, with_groups(problem.sizes, winners), read_spectra)
        if problem.rule != "global" or _error(problem, shared, read_spectra) < _error(problem, apart, read_spectra):
            return RankAssignment(shared, winners, tuple(found))
    return RankAssignment(apart, (), tuple(replace(one, shared=False) for one in found))


def _plan(problem: RankProblem, items: Sequence[LinearSize], read_spectra: ReadSpectra) -> RankPlan:
    """Ranks of these items, none above what there are factors for."""
    if problem.max_ranks is None:
        spectra = _spectra(problem, (item.name for item in items), read_spectra) if _needs_spectra(problem) else {}
        return _allocated(problem, items, spectra)
    dense = {item.name for item in items if problem.max_ranks.get(item.name) == 0}
    taken = sum(item.parameters(None) for item in items if item.name in dense)
    others = [item for item in items if item.name not in dense]
    rest = replace(problem, allowance=problem.allowance - taken)
    found = _allocated(rest, others, {}).ranks if others else {}
    ranks = {item.name: found.get(item.name) for item in items}
    ranks |= {name: min(rank, problem.max_ranks.get(name, rank)) for name, rank in found.items() if rank is not None}
    return RankPlan(ranks, sum(item.parameters(ranks[item.name]) for item in items))


def _allocated(problem: RankProblem, items: Sequence[LinearSize], spectra: Mapping[str, Tensor]) -> RankPlan:
    return allocate(
        items,
        problem.allowance,
        problem.rule,
        spectra=spectra,
        rank_multiple=problem.rank_multiple,
        sensitivities=_worth(problem, items),
    )


def _needs_spectra(problem: RankProblem) -> bool:
    return RANK_RULES[problem.rule].needs_spectra


def _spectra(problem: RankProblem, names: Iterable[str], read_spectra: ReadSpectra) -> dict[str, Tensor]:
    names = list(names)
    spectra = {name: one.singular_values for name, one in problem.tables.items()}
    found = read_spectra(name for name in names if name not in spectra)
    spectra |= {name: one.singular_values for name, one in found.items()}
    return {name: spectra[name] for name in names}


def _worth(problem: RankProblem, items: Sequence[LinearSize]) -> dict[str, float]:
    """Sensitivities of the items; a group has that of its linears, which are of one layer."""
    return {item.name: problem.sensitivities.get(item.name.split(" + ")[0], 1.0) for item in items}


def _compared(
    problem: RankProblem, groups: Sequence[Group], apart: RankPlan, read_spectra: ReadSpectra
) -> list[SharedInput]:
    if problem.rule == "global":
        names = [*(size.name for size in problem.sizes), *(group.name for group in groups)]
        available = problem.allowance - sum(size.parameters(None) - size.dense for size in problem.sizes)
        spectra = _spectra(problem, names, read_spectra)
        return compare_at_one_price(
            problem.sizes, groups, available, spectra, problem.sensitivities, problem.rank_multiple
        )
    together = equal_ranks(problem.sizes, groups, apart.ranks, problem.rank_multiple)
    ranks = {**apart.ranks, **together}
    compared = [group for group in groups if together[group.name] is not None]
    names = [name for group in compared for name in (*group.linears, group.name) if ranks[name] is not None]
    return compare_at_equal_weights(groups, ranks, read_spectra(names))


def _error(problem: RankProblem, plan: RankPlan, read_spectra: ReadSpectra) -> float:
    """Predicted squared error of a plan, for rules that need spectra."""
    return plan_error(plan, _spectra(problem, plan.ranks, read_spectra), problem.sensitivities)
