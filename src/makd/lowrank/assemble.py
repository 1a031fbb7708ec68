"""Station 3, the heart of it: one student.

moments of inputs and gradients -> decompositions -> ranks under the budget -> factors -> a copy with them in it
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, linear_shape, resolve
from makd.lowrank.depth import skipping
from makd.lowrank.factors import Decomposition, Factors
from makd.lowrank.gradients import collect_gradient_moments
from makd.lowrank.layerwise import depth_sensitivities, fit_layers_
from makd.lowrank.linear import LowRankLinear, dense_weight
from makd.lowrank.moments import InputMoments
from makd.lowrank.outcome import FactorizeReport, make_report
from makd.lowrank.outline import Outline, Plot
from makd.lowrank.parallel import map_on_cores
from makd.lowrank.ranks import RANK_RULES, LinearSize, RankPlan, allocate
from makd.lowrank.settings import FactorizeConfig
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

Progress = Callable[[str, int, int], None]


def assemble(
    teacher: PreTrainedModel,
    outline: Outline,
    plot: Plot,
    settings: FactorizeConfig,
    batches: Iterable[Mapping[str, Tensor]],
    progress: Progress,
) -> PreTrainedModel:
    """The student that `outline` draws, with its report as `student.factorization`.

    Args:
        teacher: in eval mode.
        outline: what gets factors, and which layers go.
        plot: the budget, and the sizes of everything.
        settings: solver and ranks.
        batches: calibration; seen once, or as often as the solver needs if they are a list.
        progress: called with (what, done, of).
    """
    kind, rule = SOLVERS[settings.solver], RANK_RULES[settings.rank_rule]
    started = time.perf_counter()
    with skipping(teacher, outline.dropped, outline.outputs):
        anatomy = resolve(teacher)
        share_out = partial(
            allocate,
            plot.parts.sizes(outline),
            plot.allowance(outline),
            settings.rank_rule,
            rank_multiple=settings.rank_multiple,
            sensitivities=depth_sensitivities(anatomy) if kind.in_forward_order else None,
        )
        # ranks that do not follow from spectra are known before anything is decomposed, and so is how much of it
        plan: RankPlan | None = None if rule.needs_spectra else share_out()
        spectra_wanted = plan is None or not kind.in_forward_order
        statistics = _collect(teacher, anatomy, outline.tables, kind, spectra_wanted, batches, progress)
        calibrated = time.perf_counter()
        linears = [name for name in anatomy.linears if spectra_wanted and (plan is None or plan.ranks[name])]
        decompositions = _decompose(teacher, linears, kind, statistics, {} if plan is None else plan.ranks, progress)
        student: PreTrainedModel = copy.deepcopy(teacher)
    student.eval()
    tables = decompose_tables(teacher, outline.tables, kind, statistics.inputs, statistics.gradients, batches)
    if plan is None:
        plan = share_out(spectra={name: found.singular_values for name, found in (decompositions | tables).items()})
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


def _collect(
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    tables: Iterable[Table],
    kind: Solver,
    spectra_wanted: bool,
    batches: Iterable[Mapping[str, Tensor]],
    progress: Progress,
) -> _Statistics:
    inputs, gradients = {}, {}
    head = next((table.head for table in tables if table.head is not None), None)
    if kind.inputs and (spectra_wanted or head is not None):
        inputs = collect_input_moments(teacher, anatomy, _counted("calibrate", batches, progress), head)
    if kind.gradients:
        embeddings = {table.module: table_size(teacher, table).in_features for table in tables if table.embeds}
        counted = _counted("gradients", batches, progress)
        gradients = collect_gradient_moments(teacher, anatomy, counted, embeddings=embeddings)
    return _Statistics(inputs, gradients)


def _counted(what: str, batches: Iterable[Mapping[str, Tensor]], progress: Progress) -> Iterator[Mapping[str, Tensor]]:
    """The batches, with word to the progress bar after each."""
    total = len(batches) if isinstance(batches, Sized) else 0
    for done, batch in enumerate(batches, start=1):
        yield batch
        progress(what, done, max(total, done))


def _decompose(
    teacher: PreTrainedModel,
    linears: Sequence[str],
    kind: Solver,
    statistics: _Statistics,
    ranks: Mapping[str, int | None],
    progress: Progress,
) -> dict[str, Decomposition]:
    """Decompositions of `linears`: of the terms up to their rank where `ranks` has one, else of all terms."""

    def decompose(name: str) -> Decomposition:
        weight, rank = dense_weight(teacher.get_submodule(name)), ranks.get(name)
        if not kind.needs_text:
            return decompose_svd(weight, rank)
        if not kind.inputs:
            return decompose_fisher(weight, statistics.gradients[name].gram, rank)
        if not kind.gradients:
            return decompose_whitened(weight, statistics.inputs[name].gram, rank)
        return decompose_two_sided(weight, statistics.inputs[name].gram, statistics.gradients[name].gram, rank)

    decompositions = {}
    for name, found in zip(linears, map_on_cores(decompose, linears, teacher.device), strict=True):
        decompositions[name] = found
        progress("decompose", len(decompositions), len(linears))
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
    errors = {name: factors.error for name, factors in fitted.items()}
    return make_report(student, plan, errors, fallbacks, seconds, outline, left)


def linear_sizes(teacher: PreTrainedModel, anatomy: Anatomy) -> list[LinearSize]:
    """What rank allocation knows of each factorizable linear; `teacher` may be empty."""
    sizes = []
    for name in anatomy.linears:
        linear = teacher.get_submodule(name)
        out_features, in_features = linear_shape(linear)
        sizes.append(LinearSize(name, out_features, in_features, getattr(linear, "bias", None) is not None))
    return sizes
