"""Before the flow: what making a student will take: parameters, ranks, memory, disk, and counted operations."""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from makd.anatomy import Anatomy
from makd.distill import LayerTeacher
from makd.factorization.assemble import linear_sizes
from makd.factorization.depth import Drop
from makd.factorization.outline import Candidates, Outline, find_candidates
from makd.factorization.settings import FactorizeConfig
from makd.forecasting import operations
from makd.forecasting.learning import Lessons
from makd.forecasting.memory import Holdings, Memory
from makd.forecasting.operations import LayerShape, Operations, TextShape, decomposition, regression, total
from makd.forecasting.shapes import shape_of
from makd.ranks.allocation import RANK_RULES, LinearSize, RankPlan, allocate
from makd.ranks.budget import Budget
from makd.ranks.sharing import by_linear, find_sharing, with_groups
from makd.solvers import SOLVERS

STUDENT_PASSES = 3.0
"""Forwards of each layer of a student that is fitted in forward order."""


@dataclass(frozen=True)
class Forecast:
    """What a factorization will take."""

    solver: str
    rank_rule: str
    teacher_parameters: int
    teacher_linears: int
    """Parameters of the factorizable linears, weights and biases."""
    student_parameters: int
    """At most."""
    student_linears: int
    """The same of the student: without the vocabulary's and those of layers that go."""
    ranks: Mapping[str, int | None]
    """Linear, or matrix of the vocabulary -> its rank; None is dense."""
    sizes: Mapping[str, LinearSize]
    """The same -> its shape."""
    are_ranks_known: bool
    """Whether the student will have these; else they follow from what calibration finds, and these are the uniform
    ones."""
    text: TextShape
    """That it is calibrated on."""
    phases: tuple[Memory, ...]
    """Memory of each phase of the work."""
    store: str
    """Where hidden states, and what is kept of each layer until the end, stand: `memory` or `disk`."""
    store_bytes: int
    work_bytes: int
    """On disk until the student is done, the store not counted."""
    output_bytes: int
    """Of the student's weights on disk."""
    operations: Operations
    is_least: bool = False
    """Whether time and memory are more than this: statistics and decompositions of routed experts are not counted."""
    notes: tuple[str, ...] = ()
    """Lines for a person: what is not known yet."""

    @property
    def memory(self) -> Memory:
        """Of the phase that needs most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def disk(self) -> int:
        """Bytes on the output's disk, at most, while the student is made."""
        return self.work_bytes + self.output_bytes + (self.store_bytes if self.store == "disk" else 0)


def forecast_factorization(
    model: PreTrainedModel,
    anatomy: Anatomy,
    budget: Budget,
    settings: FactorizeConfig,
    text: TextShape,
    *,
    from_files: bool = False,
    store: str = "memory",
    save_itemsize: int | None = None,
    beside: int = 1,
    teach: LayerTeacher | None = None,
) -> Forecast:
    """What it will take to factorize `model`.

    Args:
        model: the teacher; its weights are not looked at, and may be on the meta device.
        anatomy: of `model`.
        budget: of the student.
        settings: solver and ranks.
        text: that it is calibrated on.
        from_files: whether teacher and student stay on disk, but for a layer.
        store: where hidden states stand: `memory` or `disk`.
        save_itemsize: bytes of a number of the student on disk; None: as in memory.
        beside: matrices that are decomposed at a time.
        teach: teaches each layer when it has its factors.

    Raises:
        BudgetError: no student meets the budget.
        SettingError, UnsupportedModelError: what is asked for cannot be done to this model.
        DataError: layers are to be taught, and there are fewer than two batches.
    """
    settings = settings.for_model(anatomy)
    anatomy = settings.with_experts(anatomy, streamed=from_files)
    kind, sizes = SOLVERS[settings.solver], linear_sizes(model, anatomy)
    vocabulary, depth, has_text = settings.vocabulary, settings.depth, bool(text.batches)
    candidates = find_candidates(
        model, anatomy, sizes, budget, vocabulary, depth, settings.rank_multiple, has_text, settings.by_frequency
    )
    outline, notes = _outline(candidates)
    made = candidates.parts.sizes(outline)
    groups = find_sharing(anatomy, made, settings.share_input)
    plan = _uniform(made, candidates.allowance(outline), settings, anatomy)
    known = not RANK_RULES[settings.rank_rule].needs_spectra
    known = known and not candidates.layers and (settings.share_input == "always" or not groups)
    if not known:
        notes.append("ranks follow from what calibration finds; those above are the uniform ones, to give an idea")
    if anatomy.stacks:
        notes.append("statistics and decompositions of routed experts are not counted: time and memory are more")
    shape = shape_of(model, anatomy, sizes)
    one_by_one = _is_one_by_one(anatomy)
    if kind.needs_text and not one_by_one:
        notes.append("this model's layers cannot be run one by one, so what is kept of all of them is in memory")
    lessons = None if teach is None else Lessons.of(teach, anatomy, text)
    if lessons is not None:
        notes.append("lessons of layers (recipe.layerwise) are counted to their last step: they may end sooner")
    tables = candidates.parts.table_sizes(outline)
    student = candidates.parts.rest(outline) + plan.parameters
    student_linears = plan.parameters - sum(size.parameters(plan.ranks[size.name]) for size in tables)
    teacher_linears = sum(size.parameters(None) for size in sizes)
    held = Holdings(
        shape,
        kind,
        text if kind.needs_text or teach is not None else TextShape(),
        student / candidates.parts.total,
        shares=bool(groups),
        from_files=from_files,
        one_by_one=one_by_one,
        beside=beside,
        drops=bool(outline.drops) or candidates.is_search,
        lessons=lessons,
        kept_linears=student_linears / teacher_linears,
    )
    return Forecast(
        solver=settings.solver,
        rank_rule=settings.rank_rule,
        teacher_parameters=candidates.parts.total,
        teacher_linears=teacher_linears,
        student_parameters=student,
        student_linears=student_linears,
        ranks=plan.ranks,
        sizes={size.name: size for size in made},
        are_ranks_known=known,
        text=held.text,
        phases=held.phases(held.store_bytes if store == "memory" else 0),
        store=store,
        store_bytes=held.store_bytes,
        work_bytes=shape.itemsize * _waiting_weights(plan, made, settings) if from_files else 0,
        output_bytes=student * (save_itemsize or shape.itemsize),
        operations=_Count(held, settings, plan.ranks).all(),
        is_least=bool(anatomy.stacks),
        notes=tuple(notes),
    )


def _is_one_by_one(anatomy: Anatomy) -> bool:
    shared = anatomy.is_encoder_decoder or any(layer.call > 0 for layer in anatomy.layers)
    return not shared and "in_forward_order" not in anatomy.solvers_off


def _outline(candidates: Candidates) -> tuple[Outline, list[str]]:
    """What a student is drawn like: of those that are tried, the one with most layers that meets the budget."""
    notes, drops = [], candidates.drops or 0
    while True:
        gone = candidates.layers[len(candidates.layers) - drops :]
        outline = Outline(candidates.tables, tuple(Drop(name, 0.0) for name in gone))
        if candidates.parts.smallest(outline) <= candidates.limit or drops == len(candidates.layers):
            break
        drops += 1
    if candidates.is_search:
        notes.append("students of fewer and fewer layers are tried, and each takes this time")
    if drops:
        notes.append(f"{drops} layers go; which, calibration finds: the last ones stand for them here")
    notes += [f"{name} stays as it is: {reason}" for name, reason in candidates.left.items()]
    return outline, notes


def _uniform(sizes: list[LinearSize], allowance: int, settings: FactorizeConfig, anatomy: Anatomy) -> RankPlan:
    """Ranks as a rule without spectra gives them."""
    if settings.share_input != "always":
        return allocate(sizes, allowance, "uniform", rank_multiple=settings.rank_multiple)
    groups = find_sharing(anatomy, sizes, settings.share_input)
    shared = allocate(with_groups(sizes, groups), allowance, "uniform", rank_multiple=settings.rank_multiple)
    return by_linear(shared, groups)


def _waiting_weights(plan: RankPlan, sizes: list[LinearSize], settings: FactorizeConfig) -> int:
    """Weights of the factors that wait on disk: up to break-even, where ranks follow from spectra."""
    if RANK_RULES[settings.rank_rule].needs_spectra:
        return sum(size.weights(size.break_even) for size in sizes)
    return sum(size.weights(plan.ranks[size.name]) for size in sizes if plan.ranks[size.name] is not None)


@dataclass(frozen=True)
class _Count:
    """What operations are counted from."""

    held: Holdings
    settings: FactorizeConfig
    ranks: Mapping[str, int | None]

    def all(self) -> Operations:
        """Everything that is computed."""
        shape, text = self.held.shape, self.held.text
        parts = [self._passes(layer) for layer in shape.layers]
        parts += [self._decompositions(layer) for layer in shape.own_layers if self._stays(layer)]
        if self.held.kind.gradients:
            parts.append(operations.head(shape.head, shape.vocabulary, text, shape.probes))
        return total(parts)

    def _stays(self, layer: LayerShape) -> bool:
        return any(size.name in self.ranks for size in layer.linears)

    def _passes(self, layer: LayerShape) -> Operations:
        """Text that goes through one layer."""
        held, text = self.held, self.held.text
        once, kind, parts = operations.forward(layer, text), held.kind, []
        if not self._stays(layer):
            return once.times(held.walks - 1)
        if kind.inputs or kind.gradients or held.targets:
            parts.append(once.times(held.walks))
        if kind.inputs:
            parts.append(operations.input_moments(layer, text))
        if kind.gradients:
            parts += [once, operations.gradient_moments(layer, text)]
            parts.append(operations.backward(layer, text).times(held.shape.probes))
        dense = sum(size.dense for size in layer.linears)
        kept = sum(size.weights(self.ranks.get(size.name)) for size in layer.linears) / max(1, dense)
        if kind.in_forward_order:
            parts += [once.times(1 + STUDENT_PASSES * (1 + kept) / 2), operations.cross_moments(layer, text)]
        if held.lessons is not None:  # what it gives is computed when it has learned
            parts += [held.lessons.work(layer, text, kept), once.times(kept)]
        return total(parts)

    def _decompositions(self, layer: LayerShape) -> Operations:
        """Of the linears of one layer, alone and with those that read the same; and the regressions."""
        kind, shares, parts = self.held.kind, self.held.shares, []
        spectra = RANK_RULES[self.settings.rank_rule].needs_spectra
        for group in layer.inputs:
            outs, features = [size.out_features for size in group], group[0].in_features
            rank = max((self.ranks.get(size.name) or 0 for size in group), default=0)
            together = shares and len(group) > 1 and self.settings.share_input == "always"
            units = [outs] if together else [[out] for out in outs]
            terms = None if spectra else rank
            if spectra or (rank and not kind.in_forward_order):
                parts += [decomposition(kind, unit, features, terms) for unit in units]
            if shares and len(group) > 1 and self.settings.share_input == "auto" and (spectra or rank):
                parts.append(decomposition(kind, outs, features, terms))
            if kind.in_forward_order and rank:
                parts += [regression(kind, unit, features, rank) for unit in units]
        return total(parts)
