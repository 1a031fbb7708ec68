"""Station 3, the whole of it: teacher + budget + calibration text -> student.

    moments of inputs -> decompositions -> ranks under the budget -> factors -> a copy of the teacher with them in it

What was asked for and not done (a linear that stays dense, statistics that needed a fallback) is in the report that
hangs on the student.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, linear_shape, resolve
from makd.errors import DataError, NumericsError, SettingError
from makd.lowrank.budget import Budget
from makd.lowrank.factors import Decomposition, Factors
from makd.lowrank.gradients import collect_gradient_moments
from makd.lowrank.hub import count_parameters, is_student, mark_student
from makd.lowrank.layerwise import fit_layers_
from makd.lowrank.linear import LowRankLinear, dense_weight
from makd.lowrank.moments import InputMoments
from makd.lowrank.ranks import RANK_RULES, LinearSize, RankPlan, allocate, smallest_parameters
from makd.lowrank.solvers import SOLVERS, Solver, decompose_svd, decompose_two_sided, decompose_whitened
from makd.lowrank.statistics import collect_input_moments

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

    def __post_init__(self) -> None:
        SOLVERS[self.solver]
        RANK_RULES[self.rank_rule]
        if self.rank_multiple < 1:
            raise SettingError(f"factorize.rank_multiple is at least 1; got {self.rank_multiple}.")

    @property
    def rank_rule(self) -> str:
        """The rule that `ranks` stands for."""
        if self.ranks != "auto":
            return self.ranks
        return "global" if SOLVERS[self.solver].gradients else "uniform"


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
    on_progress: Callable[[str, int, int], None] | None = None,
) -> PreTrainedModel:
    """A smaller copy of `teacher`: its linears replaced by low-rank factors within `budget`.

    The classifier, pooler, embeddings and head stay as they are. The teacher is not changed.

    Args:
        teacher: any model that `makd.inspect` understands, in float32, bfloat16 or float16.
        budget: how many parameters the student may have.
        solver: one of `SOLVERS`; all but `svd` need `calibration`.
        ranks: one of `RANK_RULES`, or `auto` for the one that suits the solver.
        calibration: model inputs as a DataLoader gives them. Seen once.
        rank_multiple: ranks are multiples of it, but for the last few parameters of the budget.
        on_progress: called with (what, done, of) as the work goes on.

    Returns:
        The student, on the teacher's device and in its dtype, in eval mode; `student.factorization` is the
        `FactorizeReport`.

    Raises:
        BudgetError: the budget is above the teacher or below the smallest student.
        NumericsError: weights or activations hold NaN or infinity.
        DataError: the solver needs calibration and got none, or it does not reach every linear.
        SettingError, UnknownNameError: a setting is not allowed.
    """
    settings = FactorizeConfig(solver=solver, ranks=ranks, rank_multiple=rank_multiple)
    progress = on_progress or (lambda what, done, of: None)
    if is_student(teacher):
        raise SettingError("The teacher is factored already. Factorize the dense model that it was made from.")
    anatomy = resolve(teacher)
    _check_weights(teacher)
    sizes = linear_sizes(teacher, anatomy)
    allowance = budget.allowance(
        count_parameters(teacher)["total"], sum(size.parameters(None) for size in sizes), smallest_parameters(sizes)
    )
    allocate(sizes, allowance, "uniform", rank_multiple=rank_multiple)  # an impossible budget fails here, not later
    kind = SOLVERS[settings.solver]
    if kind.needs_text and calibration is None:
        raise DataError(
            f"Solver {solver!r} needs calibration batches (model inputs, as a DataLoader gives them). "
            "Give `calibration`, or take solver 'svd', which needs none."
        )
    several_passes = kind.in_forward_order or kind.gradients
    batches = list(calibration or ()) if several_passes else (calibration or ())
    started = time.perf_counter()
    statistics = _collect(teacher, anatomy, kind, settings.rank_rule, batches, progress)
    calibrated = time.perf_counter()
    decompositions = _decompose(teacher, anatomy, kind, settings.rank_rule, statistics, progress)
    spectra = {name: decomposition.singular_values for name, decomposition in decompositions.items()}
    plan = allocate(sizes, allowance, settings.rank_rule, spectra=spectra, rank_multiple=rank_multiple)
    student: PreTrainedModel = copy.deepcopy(teacher)
    student.eval()
    if kind.in_forward_order:
        of = len(anatomy.layers)
        grams = {name: moments.gram for name, moments in statistics.gradients.items()}
        fitted = fit_layers_(
            student, teacher, anatomy, plan.ranks, batches, grams, lambda done: progress("fit layers", done, of)
        )
    else:
        fitted = _replace_linears_(student, plan, decompositions)
    seconds = {"calibrate": calibrated - started, "factorize": time.perf_counter() - calibrated}
    student.factorization = _report(student, plan, fitted, seconds)  # type: ignore[assignment]
    mark_student(student)
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
    kind: Solver,
    ranks: str,
    batches: Iterable[Mapping[str, Tensor]],
    progress: Callable[[str, int, int], None],
) -> _Statistics:
    inputs, gradients = {}, {}
    if kind.inputs and _needs_spectra(kind, ranks):
        inputs = collect_input_moments(teacher, anatomy, _counted("calibrate", batches, progress))
    if kind.gradients:
        gradients = collect_gradient_moments(teacher, anatomy, _counted("gradients", batches, progress))
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
        if not kind.inputs:
            decompositions[name] = decompose_svd(weight)
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
        if rank is not None:
            fitted[name] = decompositions[name].factors(rank)
            bias = getattr(student.get_submodule(name), "bias", None)
            layer = LowRankLinear.from_factors(fitted[name], None if bias is None else bias.detach())
            student.set_submodule(name, layer.eval())
    return fitted


def _report(
    student: PreTrainedModel, plan: RankPlan, fitted: Mapping[str, Factors], seconds: Mapping[str, float]
) -> FactorizeReport:
    fallbacks = {name: factors.fallback for name, factors in fitted.items() if factors.fallback is not None}
    errors = {name: factors.error for name, factors in fitted.items()}
    return make_report(student, plan, errors, fallbacks, seconds)


def make_report(
    student: PreTrainedModel,
    plan: RankPlan,
    errors: Mapping[str, float],
    fallbacks: Mapping[str, str],
    seconds: Mapping[str, float],
) -> FactorizeReport:
    """What was done to each linear; fallbacks are also logged."""
    _warn(fallbacks, len(errors))
    return FactorizeReport(
        ranks={name: rank for name, rank in plan.ranks.items() if rank is not None},
        dense={
            name: "its rank reached break-even, where factors save nothing"
            for name, rank in plan.ranks.items()
            if rank is None
        },
        errors=errors,
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


def linear_sizes(teacher: PreTrainedModel, anatomy: Anatomy) -> list[LinearSize]:
    """What rank allocation knows of each factorizable linear; `teacher` may be empty."""
    sizes = []
    for name in anatomy.linears:
        linear = teacher.get_submodule(name)
        out_features, in_features = linear_shape(linear)
        sizes.append(LinearSize(name, out_features, in_features, getattr(linear, "bias", None) is not None))
    return sizes


def _check_weights(teacher: PreTrainedModel) -> None:
    for name, parameter in teacher.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise not_finite(name)


def not_finite(name: str) -> NumericsError:
    """The error for a parameter of the teacher, called `name`, that holds NaN or infinity."""
    return NumericsError(
        f"The teacher's {name} holds NaN or infinity. Its checkpoint is damaged, or was stored in a dtype "
        "too narrow for it; load a sound one."
    )
