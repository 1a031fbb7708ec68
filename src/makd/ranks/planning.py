"""Station 3: ranks under the budget, and which linears share one A.

sizes -> (decompositions ->) ranks, each linear apart -> groups that lose less as one -> ranks again, with those
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from makd.ranks.allocation import RANK_RULES, LinearSize, RankPlan, allocate
from makd.ranks.sharing import (
    InputGroup,
    SharedInput,
    by_linear,
    compare_at_equal_weights,
    compare_at_one_price,
    equal_ranks,
    plan_error,
    with_groups,
)
from makd.solvers.factors import Decomposition

Decompose = Callable[[Mapping[str, int | None]], dict[str, Decomposition]]
"""Linear, or group by its name -> how many terms are asked for (None is all); gives their decompositions."""


@dataclass(frozen=True)
class Question:
    """What ranks are looked for."""

    sizes: Sequence[LinearSize]
    """Of everything that gets factors, vocabulary too."""
    allowance: int
    """Parameters that all of it may have."""
    rule: str
    """One of `RANK_RULES`."""
    rank_multiple: int
    sensitivities: Mapping[str, float]
    """Linear -> what one unit of its energy is worth; 1 where none is given."""
    share_input: str
    """auto, never or always."""
    keeps_decompositions: bool
    """Whether factors are cut from the decompositions, so that all with a rank are wanted."""
    tables: Mapping[str, Decomposition]
    """Of the vocabulary."""


@dataclass(frozen=True)
class Planned:
    """The answer."""

    items: RankPlan
    """By linear, or by group where one A is shared."""
    decompositions: Mapping[str, Decomposition]
    """Of linears and groups, as far as they were needed."""
    groups: tuple[InputGroup, ...] = ()
    """Those that share one A."""
    found: tuple[SharedInput, ...] = ()
    """What was found of every group."""

    @property
    def plan(self) -> RankPlan:
        """By linear."""
        return by_linear(self.items, self.groups)


def plan_ranks(question: Question, groups: Sequence[InputGroup], decompose: Decompose) -> Planned:
    """Ranks within the allowance; with share_input auto, groups share where the predicted error is then smaller.

    Args:
        question: sizes, budget and settings.
        groups: of linears that may share; none, if they never shall.
        decompose: gives decompositions.

    Raises:
        BudgetError, NumericsError: as `allocate`.
    """
    if question.share_input == "always" and groups:
        made = _plan(question, with_groups(question.sizes, groups), decompose, {})
        return replace(made, groups=tuple(groups), found=tuple(SharedInput(group.linears, True) for group in groups))
    apart = _plan(question, question.sizes, decompose, {})
    if not groups:
        return apart
    if question.rule == "global":
        known, found = _compare_at_one_price(question, groups, apart, decompose)
    else:
        known, found = _compare_at_equal_weights(question, groups, apart, decompose)
    winners = tuple(group for group, one in zip(groups, found, strict=True) if one.shared)
    if winners:
        shared = _plan(question, with_groups(question.sizes, winners), decompose, known)
        if question.rule != "global" or plan_error_of(question, shared) < plan_error_of(question, apart):
            return replace(shared, groups=winners, found=tuple(found))
    return replace(apart, found=tuple(replace(one, shared=False) for one in found))


def _plan(
    question: Question, items: Sequence[LinearSize], decompose: Decompose, known: Mapping[str, Decomposition]
) -> Planned:
    """Ranks of these items."""
    share_out = partial(
        allocate,
        items,
        question.allowance,
        question.rule,
        rank_multiple=question.rank_multiple,
        sensitivities=_worth(question, items),
    )
    names = [item.name for item in items if item.name not in question.tables]
    if RANK_RULES[question.rule].needs_spectra:
        found = {**known, **decompose({name: None for name in names if name not in known})}
        found = {name: found[name] for name in names}
        spectra = {name: one.singular_values for name, one in {**found, **question.tables}.items()}
        return Planned(share_out(spectra=spectra), found)
    # ranks that do not follow from spectra are known before anything is decomposed, and so is how much of it
    plan = share_out()
    wanted = [name for name in names if plan.ranks[name]] if question.keeps_decompositions else []
    return Planned(plan, decompose({name: plan.ranks[name] for name in wanted}))


def _worth(question: Question, items: Sequence[LinearSize]) -> dict[str, float]:
    """Sensitivities of the items; a group has that of its linears, which are of one layer."""
    return {item.name: question.sensitivities.get(item.name.split(" + ")[0], 1.0) for item in items}


def _compare_at_one_price(
    question: Question, groups: Sequence[InputGroup], apart: Planned, decompose: Decompose
) -> tuple[Mapping[str, Decomposition], list[SharedInput]]:
    known = {**apart.decompositions, **decompose({group.name: None for group in groups})}
    spectra = {name: one.singular_values for name, one in {**known, **question.tables}.items()}
    available = question.allowance - sum(size.parameters(None) - size.dense for size in question.sizes)
    return known, compare_at_one_price(
        question.sizes, groups, available, spectra, question.sensitivities, question.rank_multiple
    )


def _compare_at_equal_weights(
    question: Question, groups: Sequence[InputGroup], apart: Planned, decompose: Decompose
) -> tuple[Mapping[str, Decomposition], list[SharedInput]]:
    whole = RANK_RULES[question.rule].needs_spectra
    together = equal_ranks(question.sizes, groups, apart.items.ranks)
    ranks = {**apart.items.ranks, **together}
    wanted = [
        name
        for group in groups
        if together[group.name] is not None
        for name in (*group.linears, group.name)
        if ranks[name] is not None and name not in apart.decompositions
    ]
    known = {**apart.decompositions, **decompose({name: None if whole else ranks[name] for name in wanted})}
    return known if whole else {}, compare_at_equal_weights(groups, ranks, known)


def plan_error_of(question: Question, planned: Planned) -> float:
    """Predicted squared error of what was planned, for rules that need spectra."""
    spectra = {name: one.singular_values for name, one in {**planned.decompositions, **question.tables}.items()}
    return plan_error(planned.items, spectra, question.sensitivities)
