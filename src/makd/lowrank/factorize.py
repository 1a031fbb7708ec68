"""Station 3, the whole of it: teacher + budget + calibration text -> student.

    moments of inputs -> decompositions -> ranks under the budget -> factors -> a copy of the teacher with them in it

What was asked for and not done (a linear that stays dense, statistics that needed a fallback) is in the report that
hangs on the student.
"""

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, linear_shape, resolve
from makd.errors import DataError, NumericsError, SettingError
from makd.lowrank.budget import Budget
from makd.lowrank.factors import Decomposition, Factors
from makd.lowrank.hub import count_parameters, is_student, mark_student
from makd.lowrank.linear import LowRankLinear
from makd.lowrank.moments import InputMoments
from makd.lowrank.ranks import RANK_RULES, LinearSize, RankPlan, allocate
from makd.lowrank.solvers import SOLVERS
from makd.lowrank.statistics import collect_input_moments

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FactorizeConfig:
    """How the student's factors and ranks are found."""

    solver: str = "whitened"
    """One of `makd.lowrank.solvers.SOLVERS`."""
    ranks: str = "uniform"
    """How the budget is spread over the linears; one of `makd.lowrank.ranks.RANK_RULES`."""
    rank_multiple: int = 8
    """Ranks are multiples of it as far as the budget allows; hardware likes 8 or more."""

    def __post_init__(self) -> None:
        SOLVERS[self.solver]
        RANK_RULES[self.ranks]
        if self.rank_multiple < 1:
            raise SettingError(f"factorize.rank_multiple is at least 1; got {self.rank_multiple}.")


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
    solver: str = "whitened",
    ranks: str = "uniform",
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
        ranks: one of `RANK_RULES`.
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
    sizes = _sizes(teacher, anatomy)
    allowance = budget.allowance(count_parameters(teacher)["total"], sum(size.parameters(None) for size in sizes))
    allocate(sizes, allowance, "uniform", rank_multiple=rank_multiple)  # an impossible budget fails here, not later
    started = time.perf_counter()
    moments = _calibrate(teacher, anatomy, settings.solver, calibration, progress)
    calibrated = time.perf_counter()
    decompositions = _decompose(teacher, anatomy, settings.solver, moments, progress)
    spectra = {name: decomposition.singular_values for name, decomposition in decompositions.items()}
    plan = allocate(sizes, allowance, settings.ranks, spectra=spectra, rank_multiple=rank_multiple)
    student = copy.deepcopy(teacher).eval()
    report = _replace_linears_(student, plan, decompositions)
    seconds = {"calibrate": calibrated - started, "factorize": time.perf_counter() - calibrated}
    student.factorization = dataclasses.replace(report, seconds=seconds)
    mark_student(student)
    return student


def _calibrate(
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    solver: str,
    calibration: Iterable[Mapping[str, Tensor]] | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, InputMoments]:
    if not SOLVERS[solver].needs_moments:
        return {}
    if calibration is None:
        raise DataError(
            f"Solver {solver!r} needs calibration batches (model inputs, as a DataLoader gives them). "
            "Give `calibration`, or take solver 'svd', which needs none."
        )
    total = len(calibration) if hasattr(calibration, "__len__") else 0
    done = 0

    def on_batch() -> None:
        nonlocal done
        done += 1
        progress("calibrate", done, max(total, done))

    return collect_input_moments(teacher, anatomy, calibration, on_batch)


def _decompose(
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    solver: str,
    moments: Mapping[str, InputMoments],
    progress: Callable[[str, int, int], None],
) -> dict[str, Decomposition]:
    decompositions = {}
    for done, name in enumerate(anatomy.linears, start=1):
        weight = dense_weight(teacher.get_submodule(name))
        decompositions[name] = SOLVERS[solver].decompose(weight, moments.get(name))
        progress("decompose", done, len(anatomy.linears))
    return decompositions


def _replace_linears_(
    student: PreTrainedModel, plan: RankPlan, decompositions: Mapping[str, Decomposition]
) -> FactorizeReport:
    dense, errors, fallbacks, ranks = {}, {}, {}, {}
    for name, rank in plan.ranks.items():
        if rank is None:
            dense[name] = "its rank reached break-even, where factors save nothing"
            continue
        factors: Factors = decompositions[name].factors(rank)
        linear = student.get_submodule(name)
        bias = getattr(linear, "bias", None)
        replacement = LowRankLinear.from_factors(factors, None if bias is None else bias.detach())
        replacement.train(linear.training)
        student.set_submodule(name, replacement)
        ranks[name] = rank
        errors[name] = factors.error
        if factors.fallback is not None:
            fallbacks[name] = factors.fallback
            logger.warning("%s: %s", name, factors.fallback)
    return FactorizeReport(ranks, dense, errors, fallbacks, count_parameters(student))


def dense_weight(linear: nn.Module) -> Tensor:
    """The weight (out, in) of a linear; transformers' Conv1D keeps it the other way round."""
    weight: Tensor = linear.weight.detach()  # type: ignore[assignment, operator]
    return weight if tuple(weight.shape) == linear_shape(linear) and isinstance(linear, nn.Linear) else weight.T


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
