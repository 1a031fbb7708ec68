"""Station 3, the whole of it: teacher + budget + calibration text -> student.

    outline -> moments of inputs -> decompositions -> ranks under the budget -> factors -> a copy of the teacher

The outline says whether embeddings and head get factors too, and which layers go; under a small budget some are tried.

What was asked for and not done (a linear that stays dense, statistics that needed a fallback) is in the report that
hangs on the student.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, linear_shape, resolve
from makd.errors import BudgetError, DataError, NumericsError, SettingError
from makd.lowrank.budget import Budget
from makd.lowrank.depth import skipping
from makd.lowrank.drift import choose_probes, drift
from makd.lowrank.factors import Decomposition, Factors
from makd.lowrank.gradients import collect_gradient_moments
from makd.lowrank.hub import count_parameters, is_student, mark_student
from makd.lowrank.layerwise import depth_sensitivities, fit_layers_
from makd.lowrank.linear import LowRankLinear, dense_weight
from makd.lowrank.moments import InputMoments
from makd.lowrank.outline import VOCABULARY_CHOICES, Outline, Plot, draw_plot
from makd.lowrank.ranks import RANK_RULES, LinearSize, RankPlan, allocate
from makd.lowrank.solvers import (
    SOLVERS,
    Solver,
    decompose_fisher,
    decompose_svd,
    decompose_two_sided,
    decompose_whitened,
)
from makd.lowrank.statistics import collect_input_moments
from makd.lowrank.vocabulary import Table, decompose_tables, replace_tables_, table_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FactorizeConfig:
    """How the student's factors and ranks are found."""

    solver: str = "two_sided"
    """One of `makd.lowrank.solvers.SOLVERS`."""
    ranks: str = "auto"
    """How the budget is spread over the linears; one of `makd.lowrank.ranks.RANK_RULES`. `auto` is `global` for
    solvers that measure all linears in one unit, and `uniform` for others."""
    rank_multiple: int = 8
    """Ranks are multiples of it as far as the budget allows; hardware likes 8 or more."""
    vocabulary: str = "auto"
    """Whether token embeddings and LM head get factors: `dense`, `factored`, or `auto`, only where a budget of the
    whole model would leave the linears less than `makd.lowrank.outline.COMFORT` of their parameters."""
    depth: int | str = "auto"
    """How many layers stay: a number, `all`, or `auto`: all, but where `auto` factors the vocabulary, fewer and fewer
    are tried, and the student whose outputs are nearest to the teacher's on the calibration text is taken."""

    def __post_init__(self) -> None:
        SOLVERS[self.solver]
        RANK_RULES[self.rank_rule]
        if self.rank_multiple < 1:
            raise SettingError(f"factorize.rank_multiple is at least 1; got {self.rank_multiple}.")
        if self.vocabulary not in VOCABULARY_CHOICES:
            raise SettingError(f"factorize.vocabulary is auto, dense or factored; got {self.vocabulary!r}.")
        words = isinstance(self.depth, str) and self.depth in ("auto", "all")
        if not words and (not isinstance(self.depth, int) or isinstance(self.depth, bool) or self.depth < 1):
            raise SettingError(
                f"factorize.depth is auto, all, or how many layers stay, at least 1; got {self.depth!r}."
            )

    @property
    def rank_rule(self) -> str:
        """The rule that `ranks` stands for."""
        if self.ranks != "auto":
            return self.ranks
        kind = SOLVERS[self.solver]
        return "global" if kind.inputs and kind.gradients else "uniform"


@dataclass(frozen=True)
class FactorizeReport:
    """What factorization did to each linear."""

    ranks: Mapping[str, int]
    """Factored linear -> rank."""
    dense: Mapping[str, str]
    """Linear left as it was -> why."""
    errors: Mapping[str, float]
    """Factored linear -> predicted error relative to dropping the linear, in the solver's own norm, in [0, 1]."""
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    """Factored linear -> what was done because its statistics were not positive definite."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Of the whole student, shared ones once: `total`, `factored`, `vocabulary`."""
    vocabulary: Mapping[str, int] = field(default_factory=dict)
    """Factored embeddings or LM head -> rank; a head that is tied to the embeddings has theirs. They are in `errors`,
    `fallbacks` and, where they stay as they are though factors would have helped, in `dense` too."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Layer that the student does without -> what its absence was measured to do."""
    trials: Mapping[int, float] = field(default_factory=dict)
    """Where several depths were tried: layers -> how far the student's outputs were from the teacher's on calibration
    text, in nats a prediction or as squared distance of unit embeddings. The nearest was taken."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What `calibrate` (statistics) and `factorize` (decompositions, ranks, factors) took."""


def factorize(
    teacher: PreTrainedModel,
    budget: Budget,
    *,
    solver: str = "two_sided",
    ranks: str = "auto",
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    rank_multiple: int = 8,
    vocabulary: str = "auto",
    depth: int | str = "auto",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> PreTrainedModel:
    """A smaller copy of `teacher`: its linears replaced by low-rank factors within `budget`.

    The classifier and pooler stay as they are; embeddings, head and depth too, unless the budget is too small for that
    or the settings say otherwise. The teacher is not changed.

    Args:
        teacher: any model that `makd.inspect` understands, in float32, bfloat16 or float16.
        budget: how many parameters the student may have.
        solver: one of `SOLVERS`; all but `svd` need `calibration`.
        ranks: one of `RANK_RULES`, or `auto` for the one that suits the solver.
        calibration: model inputs as a DataLoader gives them. Seen once.
        rank_multiple: ranks are multiples of it, but for the last few parameters of the budget.
        vocabulary: whether embeddings and LM head get factors: see `FactorizeConfig`.
        depth: how many layers stay: see `FactorizeConfig`.
        on_progress: called with (what, done, of) as the work goes on.

    Returns:
        The student, on the teacher's device and in its dtype, in eval mode; `student.factorization` is the
        `FactorizeReport`.

    Raises:
        BudgetError: the budget is above the teacher or below the smallest student that the settings allow.
        NumericsError: weights or activations hold NaN or infinity.
        DataError: the solver needs calibration and got none, or it does not reach every linear.
        SettingError, UnknownNameError: a setting is not allowed.
    """
    settings = FactorizeConfig(
        solver=solver, ranks=ranks, rank_multiple=rank_multiple, vocabulary=vocabulary, depth=depth
    )
    progress = on_progress or (lambda what, done, of: None)
    if is_student(teacher):
        raise SettingError("The teacher is factored already. Factorize the dense model that it was made from.")
    anatomy = resolve(teacher)
    _check_weights(teacher)
    kind, has_text = SOLVERS[settings.solver], calibration is not None
    plot = draw_plot(teacher, anatomy, _sizes(teacher, anatomy), budget, vocabulary, depth, has_text)
    if kind.needs_text and not has_text:
        raise DataError(
            f"Solver {solver!r} needs calibration batches (model inputs, as a DataLoader gives them). "
            "Give `calibration`, or take solver 'svd', which needs none."
        )
    several_passes = kind.in_forward_order or kind.gradients or bool(plot.tables) or bool(plot.layers)
    batches = list(calibration or ()) if several_passes else (calibration or ())
    was_training = teacher.training
    teacher.eval()
    try:
        student = _nearest(teacher, anatomy, plot, settings, batches, progress)
    finally:
        teacher.train(was_training)
    mark_student(student)
    return student


def _nearest(
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    plot: Plot,
    settings: FactorizeConfig,
    batches: Iterable[Mapping[str, Tensor]],
    progress: Callable[[str, int, int], None],
) -> PreTrainedModel:
    """The student of the outline that keeps outputs nearest to the teacher's; fewer layers until it gets worse."""
    probes = choose_probes(batches) if isinstance(batches, list) else []
    if plot.layers and not probes:
        raise DataError("Calibration needs at least one batch; it got none. Is the data empty?")
    best: PreTrainedModel | None = None
    trials: dict[int, float] = {}
    for outline in plot.outlines(teacher, anatomy, probes):
        student = _student_of(teacher, outline, plot, settings, batches, progress)
        if not plot.is_search:
            return student
        depth, nearest = len(anatomy.layers) - len(outline.drops), min(trials.values(), default=math.inf)
        trials[depth] = drift(student, teacher, anatomy, probes)
        logger.info("%d layers: %.4g from the teacher's outputs", depth, trials[depth])
        if trials[depth] >= nearest:
            break
        best = student
    if best is None:  # layers of several sizes: `draw_plot` looked at the largest, and others were the ones to go
        raise BudgetError(
            f"A budget of {plot.limit:,} parameters is below the smallest student without the {plot.drops} layers that "
            "are missed least. Give a larger one, or a smaller factorize.depth."
        )
    report: FactorizeReport = best.factorization  # type: ignore[assignment]
    best.factorization = replace(report, trials=trials)  # type: ignore[assignment]
    return best


def _student_of(
    teacher: PreTrainedModel,
    outline: Outline,
    plot: Plot,
    settings: FactorizeConfig,
    batches: Iterable[Mapping[str, Tensor]],
    progress: Callable[[str, int, int], None],
) -> PreTrainedModel:
    """A student by `outline`, with its report."""
    kind, rule, multiple = SOLVERS[settings.solver], settings.rank_rule, settings.rank_multiple
    started = time.perf_counter()
    with skipping(teacher, outline.dropped, outline.outputs):
        anatomy = resolve(teacher)
        statistics = _collect(teacher, anatomy, outline.tables, kind, rule, batches, progress)
        calibrated = time.perf_counter()
        decompositions = _decompose(teacher, anatomy, kind, rule, statistics, progress)
        student: PreTrainedModel = copy.deepcopy(teacher)
    student.eval()
    tables = decompose_tables(teacher, outline.tables, kind, statistics.inputs, statistics.gradients, batches)
    spectra = {name: found.singular_values for name, found in (decompositions | tables).items()}
    deeper = depth_sensitivities(anatomy) if kind.in_forward_order else None
    plan = allocate(
        plot.parts.sizes(outline),
        plot.allowance(outline),
        rule,
        spectra=spectra,
        rank_multiple=multiple,
        sensitivities=deeper,
    )
    fitted = replace_tables_(student, outline.tables, plan.ranks, tables)
    if kind.in_forward_order:
        of = len(anatomy.layers)
        grams = {name: moments.gram for name, moments in statistics.gradients.items()}
        fitted |= fit_layers_(
            student, teacher, anatomy, plan.ranks, batches, grams, lambda done: progress("fit layers", done, of)
        )
    else:
        fitted |= _replace_linears_(student, plan, decompositions)
    seconds = {"calibrate": calibrated - started, "factorize": time.perf_counter() - calibrated}
    student.factorization = _report(student, plan, fitted, seconds, outline, plot.left)  # type: ignore[assignment]
    return student


@dataclass(frozen=True)
class _Statistics:
    """What calibration found, by linear; empty where the solver does not look at it."""

    inputs: Mapping[str, InputMoments]
    gradients: Mapping[str, InputMoments]


def _needs_spectra(kind: Solver, ranks: str) -> bool:
    """A solver that fits in forward order needs no decomposition of its own, unless ranks are to follow from it."""
    return not kind.in_forward_order or ranks != "uniform"


def _collect(
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    tables: Iterable[Table],
    kind: Solver,
    ranks: str,
    batches: Iterable[Mapping[str, Tensor]],
    progress: Callable[[str, int, int], None],
) -> _Statistics:
    inputs, gradients = {}, {}
    head = next((table.head for table in tables if table.head is not None), None)
    if kind.inputs and (_needs_spectra(kind, ranks) or head is not None):
        inputs = collect_input_moments(teacher, anatomy, _counted("calibrate", batches, progress), head)
    if kind.gradients:
        embeddings = {table.module: table_size(teacher, table).in_features for table in tables if table.embeds}
        counted = _counted("gradients", batches, progress)
        gradients = collect_gradient_moments(teacher, anatomy, counted, embeddings=embeddings)
    return _Statistics(inputs, gradients)


def _counted(
    what: str, batches: Iterable[Mapping[str, Tensor]], progress: Callable[[str, int, int], None]
) -> Iterator[Mapping[str, Tensor]]:
    """The batches, with word to the progress bar after each."""
    total = len(batches) if isinstance(batches, Sized) else 0
    for done, batch in enumerate(batches, start=1):
        yield batch
        progress(what, done, max(total, done))


def _decompose(
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    kind: Solver,
    ranks: str,
    statistics: _Statistics,
    progress: Callable[[str, int, int], None],
) -> dict[str, Decomposition]:
    if not _needs_spectra(kind, ranks):
        return {}
    decompositions = {}
    for done, name in enumerate(anatomy.linears, start=1):
        weight = dense_weight(teacher.get_submodule(name))
        if not kind.needs_text:
            decompositions[name] = decompose_svd(weight)
        elif not kind.inputs:
            decompositions[name] = decompose_fisher(weight, statistics.gradients[name].gram)
        elif not kind.gradients:
            decompositions[name] = decompose_whitened(weight, statistics.inputs[name].gram)
        else:
            inputs, gradients = statistics.inputs[name].gram, statistics.gradients[name].gram
            decompositions[name] = decompose_two_sided(weight, inputs, gradients)
        progress("decompose", done, len(anatomy.linears))
    return decompositions


def _replace_linears_(
    student: PreTrainedModel, plan: RankPlan, decompositions: Mapping[str, Decomposition]
) -> dict[str, Factors]:
    fitted = {}
    for name, rank in plan.ranks.items():
        if rank is not None and name in decompositions:
            fitted[name] = decompositions[name].factors(rank)
            bias = getattr(student.get_submodule(name), "bias", None)
            layer = LowRankLinear.from_factors(fitted[name], None if bias is None else bias.detach())
            student.set_submodule(name, layer.eval())
    return fitted


def _report(
    student: PreTrainedModel,
    plan: RankPlan,
    fitted: Mapping[str, Factors],
    seconds: Mapping[str, float],
    outline: Outline,
    left: Mapping[str, str],
) -> FactorizeReport:
    fallbacks = {name: factors.fallback for name, factors in fitted.items() if factors.fallback is not None}
    _warn(fallbacks, len(fitted))
    vocabulary = {table.module for table in outline.tables}
    factored = {name: rank for name, rank in plan.ranks.items() if rank is not None}
    return FactorizeReport(
        ranks={name: rank for name, rank in factored.items() if name not in vocabulary},
        vocabulary={name: rank for name, rank in factored.items() if name in vocabulary},
        dropped={
            drop.layer: f"number {number} to go: the outputs were then {drop.drift:.3g} from the teacher's"
            for number, drop in enumerate(outline.drops, start=1)
        },
        dense={
            **{
                name: "its rank reached break-even, where factors save nothing"
                for name, rank in plan.ranks.items()
                if rank is None
            },
            **left,
        },
        errors={name: factors.error for name, factors in fitted.items()},
        fallbacks=fallbacks,
        parameters=count_parameters(student),
        seconds=seconds,
    )


def _warn(fallbacks: Mapping[str, str], fitted: int) -> None:
    """One line for each kind of fallback, not for each linear: the report has them all."""
    kinds: dict[str, list[str]] = {}
    for name, fallback in fallbacks.items():
        kinds.setdefault(fallback, []).append(name)
    for fallback, names in kinds.items():
        others = f" and {len(names) - 1} more of {fitted} linears" if len(names) > 1 else ""
        logger.warning("%s%s: %s", names[0], others, fallback)


def _sizes(teacher: PreTrainedModel, anatomy: Anatomy) -> list[LinearSize]:
    sizes = []
    for name in anatomy.linears:
        linear = teacher.get_submodule(name)
        out_features, in_features = linear_shape(linear)
        sizes.append(LinearSize(name, out_features, in_features, getattr(linear, "bias", None) is not None))
    return sizes


def _check_weights(teacher: PreTrainedModel) -> None:
    for name, parameter in teacher.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NumericsError(
                f"The teacher's {name} holds NaN or infinity. Its checkpoint is damaged, or was stored in a dtype "
                "too narrow for it; load a sound one."
            )
