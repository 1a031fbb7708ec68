"""Station 3: what of the teacher gets factors, and which layers the student does without, under a budget.

Budgets that the linears can meet leave embeddings, head and depth alone. Below that, the vocabulary is factored too,
and students of fewer and fewer layers are tried.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, count_experts
from makd.errors import SettingError
from makd.factorization.depth import Drop, droppable_layers, greedy_drops, layer_outputs
from makd.factorization.vocabulary import Table, find_tables, table_sizes
from makd.ranks.allocation import LinearSize, smallest_parameters
from makd.ranks.budget import Budget
from makd.ranks.steps import RankSteps

VOCABULARY_CHOICES = ("auto", "dense", "factored")

COMFORT = 0.25
"""Share of their parameters above which linears are left to meet a budget alone. A choice on the safe side, not
a measurement: below it, ranks are less than an eighth of the width."""
EMPHASES = (1.0, 9.0)
"""What is tried as the vocabulary's emphasis. Predicted errors are of small changes, one at a time; under small budgets
all tokens err at once. Of 1, 9, 100 and more, 9 kept MiniLM-L6 nearest to itself at 8, 15 and 30 % of all parameters,
1 at 50 %."""
TRIALS = 8
"""Depths that are tried at most: each costs a factorization."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outline:
    """One way to make the student."""

    tables: tuple[Table, ...] = ()
    """Matrices of the vocabulary that get factors besides the linears."""
    drops: tuple[Drop, ...] = ()
    """Layers that go."""
    outputs: int = 0
    """What layers return, as `SkippedLayer` takes it."""
    emphasis: float = 1.0
    """What an error of the vocabulary counts for, beside an equal one of the linears, when ranks are shared out."""

    @property
    def dropped(self) -> tuple[str, ...]:
        """Modules of the layers that go."""
        return tuple(drop.layer for drop in self.drops)


@dataclass(frozen=True)
class Parts:
    """What the teacher's parameters are parameters of."""

    total: int
    linears: Sequence[LinearSize]
    tables: Mapping[str, tuple[LinearSize, ...]]
    """Matrix of the vocabulary -> sizes of what of it has a rank of its own."""
    layers: Mapping[str, int]
    """Layer that may be dropped -> all its parameters."""
    experts: int = 0
    """Parameters of routed experts that stay dense."""
    lowest: int = 1
    """The lowest rank of a factored matrix."""

    def sizes(self, outline: Outline) -> list[LinearSize]:
        """Everything that gets factors."""
        inside = tuple(f"{layer}." for layer in outline.dropped)
        linears = [size for size in self.linears if not size.name.startswith(inside)] if inside else [*self.linears]
        return [*linears, *self.table_sizes(outline)]

    def table_sizes(self, outline: Outline) -> list[LinearSize]:
        """Everything of the vocabulary that gets factors."""
        return [size for table in outline.tables for size in self.tables[table.module]]

    def rest(self, outline: Outline) -> int:
        """Parameters that get no factors: those that stay as they are, and the order of tokens in bands."""
        kept = self.total - sum(self.layers[layer] for layer in outline.dropped)
        orders = sum(sum(table.bands) for table in outline.tables)
        return kept - sum(size.parameters(None) for size in self.sizes(outline)) + orders

    def smallest(self, outline: Outline) -> int:
        """Parameters with the lowest rank everywhere."""
        return self.rest(outline) + smallest_parameters(self.sizes(outline), self.lowest)


@dataclass(frozen=True)
class Candidates:
    """The outlines that settings, model and budget allow."""

    parts: Parts
    limit: int
    """Parameters that the whole student may have."""
    tables: tuple[Table, ...]
    left: Mapping[str, str]
    """What was asked for, or would have helped, and is not done: module, or `depth` -> why."""
    layers: tuple[str, ...]
    """That may be dropped; empty if none shall be."""
    drops: int | None
    """How many shall be; None to find out."""

    @property
    def is_search(self) -> bool:
        """Whether there may be several outlines, to be told apart by what comes of them."""
        return bool(self.layers) and self.drops is None

    def allowance(self, outline: Outline) -> int:
        """Parameters that all that gets factors may have together."""
        return self.limit - self.parts.rest(outline)

    def outlines(
        self, teacher: PreTrainedModel, anatomy: Anatomy, probes: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[Outline]:
        """The outlines that the budget can be met with, from many layers to few; `teacher` is in eval mode."""
        whole = Outline(self.tables)
        if not self.drops and self.parts.smallest(whole) <= self.limit:
            yield whole
        if not self.layers:
            return
        step = 1 if self.drops is not None else -(-len(anatomy.layers) // TRIALS)
        outputs, drops = layer_outputs(teacher, anatomy, probes[0]), []
        for drop in greedy_drops(teacher, anatomy, self.layers, probes, outputs):
            drops.append(drop)
            outline = Outline(self.tables, tuple(drops), outputs)
            wanted = len(drops) == self.drops if self.drops is not None else len(drops) % step == 0
            if (wanted or len(drops) == len(self.layers)) and self.parts.smallest(outline) <= self.limit:
                yield outline
            if len(drops) == self.drops:
                return


def find_candidates(
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    linears: Sequence[LinearSize],
    budget: Budget,
    vocabulary: str,
    depth: int | str,
    rank_multiple: int | None,
    has_text: bool,
    by_frequency: bool = False,
) -> Candidates:
    """What may be done to meet `budget`.

    Args:
        teacher: with all its layers.
        anatomy: of `teacher`.
        linears: sizes of its factorizable linears.
        budget: of the student.
        vocabulary: whether embeddings and head get factors.
        depth: how many layers stay.
        rank_multiple: what every rank is a multiple of; None if of nothing.
        has_text: whether there is calibration text, without which nobody knows which layers to drop.
        by_frequency: whether embeddings may be cut into bands of tokens by frequency.

    Raises:
        BudgetError: no outline meets the budget, or it is above the teacher.
        SettingError: what is asked for cannot be done to this model.
    """
    if budget.keep_linears is not None and vocabulary == "factored":
        logger.warning(
            "A factored vocabulary and keep_linears: the budget is that of the linears alone, and what the vocabulary "
            "gives up goes to them, so that they keep more than %g. Give keep or params for a smaller model",
            budget.keep_linears,
        )
    tables, left = find_tables(teacher, anatomy, by_frequency)
    layers, why_deep = droppable_layers(teacher, anatomy)
    total = sum(parameter.numel() for parameter in teacher.parameters())
    dense_experts = count_experts(teacher, anatomy) - sum(stack.parameters for stack in anatomy.stacks)
    parts = Parts(
        total,
        linears,
        {table.module: table_sizes(teacher, table) for table in tables},
        {name: sum(p.numel() for p in teacher.get_submodule(name).parameters()) for name in layers},
        dense_experts,
        RankSteps.of(rank_multiple).lowest,
    )
    linear_parameters = sum(size.parameters(None) for size in linears)
    limit = budget.limit(total, linear_parameters, parts.experts)
    tight = budget.keep_linears is None and limit - parts.rest(Outline()) < COMFORT * linear_parameters
    if vocabulary == "factored" and not tables:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise SettingError(f"factorize.vocabulary is factored, but {reasons}. Leave it at auto, or set it to dense.")
    chosen = tables if vocabulary == "factored" or (vocabulary == "auto" and tight) else ()
    drops = _drops(depth, len(anatomy.layers), layers, why_deep)
    if drops == 0 or (drops is None and not (tight and has_text)):
        layers = []
    if drops and not has_text:
        raise SettingError(
            f"factorize.depth is {depth}, but which layers to drop is measured on calibration text: give some."
        )
    left = {
        name: reason for name, reason in left.items() if vocabulary == "factored" or (tight and vocabulary == "auto")
    }
    if tight and depth == "auto" and why_deep is not None:
        left["depth"] = why_deep
    found = Candidates(parts, limit, chosen, left, tuple(layers), drops)
    _check(found, total, vocabulary, depth)
    return found


def _drops(depth: int | str, count: int, layers: Sequence[str], why_deep: str | None) -> int | None:
    """How many layers go; None to find out."""
    if isinstance(depth, str):
        return None if depth == "auto" else 0
    if not count - len(layers) <= depth <= count:
        because = why_deep or "the first layer of each kind of attention stays, since caches count tokens by it"
        raise SettingError(
            f"factorize.depth is how many of the model's {count} layers stay, from {count - len(layers)} to {count} "
            f"({because}); got {depth}."
        )
    return count - depth


def _check(found: Candidates, total: int, vocabulary: str, depth: int | str) -> None:
    parts = found.parts
    dearest = sorted(found.layers, key=lambda name: -parts.layers[name])[: found.drops]
    outline = Outline(found.tables, tuple(Drop(name, 0.0) for name in dearest))
    told = [f"rank {parts.lowest} everywhere"]
    if found.tables:
        told.append("the vocabulary too")
    if dearest:
        told.append(f"{len(dearest)} layers dropped")
    hints = [
        f"{name} auto" for name, value in (("vocabulary", vocabulary), ("depth", depth)) if value in ("dense", "all")
    ]
    if parts.lowest > 1:
        hints.append("a smaller rank_multiple")
    more = f" (factorize with {' and '.join(hints)} may go lower.)" if hints else ""
    experts = 0 if dearest else parts.experts
    Budget.check(found.limit, total, parts.rest(outline), parts.smallest(outline), ", ".join(told), more, experts)
