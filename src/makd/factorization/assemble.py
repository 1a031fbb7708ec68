"""Station 3: from what calibration kept to one student: ranks under the budget -> factors -> a copy with them in it.

Students that differ in their ranks alone are assembled from the same calibration.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Layer, linear_shape
from makd.calibration import entries
from makd.calibration.source import LayerSource, ModelSource
from makd.factorization.calibrate import CalibrationResult, FactorizationJob, tokens_read
from makd.factorization.fit import FitSettings, depth_sensitivities, fit_layer_
from makd.factorization.kept_layers import KeptStudent, restore_layers_
from makd.factorization.layers import LayersReport, LinearFit, MakeLayer, begin_, enter, make_layers_
from makd.factorization.outcome import FactorizeReport, make_report
from makd.factorization.terms import Terms
from makd.factorization.vocabulary import replace_tables_
from makd.progress import Progress
from makd.ranks.allocation import LinearSize
from makd.ranks.curves import ErrorCurve, thin
from makd.ranks.planning import RankAssignment, plan_ranks
from makd.ranks.sharing import SharedStack, all_sizes
from makd.student.experts import replace_stack_
from makd.student.shared_linear import replace_linears_


def plan(job: FactorizationJob, calibrated: CalibrationResult) -> RankAssignment:
    """Ranks under the budget, and which linears share one A."""
    sensitivities = depth_sensitivities(job.anatomy) if job.kind.in_forward_order else {}
    sensitivities |= {name: job.outline.emphasis for table in job.outline.tables for name in table.parts}
    problem = job.problem(sensitivities, calibrated.tables.parts, calibrated.terms.request.max_ranks)
    return plan_ranks(problem, calibrated.terms.groups(), calibrated.terms.spectra)


def assemble(job: FactorizationJob, calibrated: CalibrationResult) -> tuple[PreTrainedModel, FactorizeReport]:
    """The student that the job's outline draws, and what was done."""
    planned = plan(job, calibrated)
    student: PreTrainedModel = copy.deepcopy(job.source.model)
    student.eval().requires_grad_(True)  # what of the teacher is frozen is no matter of the student's
    ranks = planned.plan.ranks
    factors = replace_tables_(student, job.outline.tables, ranks, calibrated.tables)
    of_tables = {name: LinearFit(one.error, one.fallback) for name, one in factors.items()}
    source = ModelSource(student)
    if calibrated.store.lasting:
        cut_stacks = partial(cut_stacks_, calibrated.terms, planned, student, job.anatomy)
        restore_layers_(student, job.anatomy, calibrated.store, planned, cut_stacks)
        source = KeptStudent(student, calibrated.store)
    made = make_(job, calibrated, planned, source, student if factors else None)
    made = replace(made, fitted={**of_tables, **made.fitted})
    return student, report(job, calibrated, student, planned, made)


def reset_student(calibrated: CalibrationResult) -> None:
    """Let another student be assembled from the same calibration."""
    for entry in entries.OF_STUDENT:
        calibrated.store.remove(entry)


def free_intermediates(calibrated: CalibrationResult) -> None:
    """Free the room of what only unfinished students need; the finished one can still be put together again."""
    whole = None if calibrated.walk is None else calibrated.walk.whole
    for store in (calibrated.store, *([] if whole is None else [whole.store])):
        for entry in entries.OF_UNFINISHED:
            store.remove(entry)


def make_(
    job: FactorizationJob,
    calibrated: CalibrationResult,
    planned: RankAssignment,
    student: LayerSource,
    begins: PreTrainedModel | None = None,
) -> LayersReport:
    """Put the factors into `student`, layer by layer, and teach it on the way if the job says so.

    Args:
        job: what the student is made from.
        calibrated: what was kept.
        planned: ranks.
        student: changed in place.
        begins: a student whose embeddings are its own.
    """
    cut_stacks = partial(cut_stacks_, calibrated.terms, planned, student.model, job.anatomy)
    of_linears: MakeLayer = partial(cut_layer_, calibrated.terms, planned, student.model)
    if job.kind.in_forward_order:
        assert calibrated.walk is not None
        groups = frozenset(group.linears for group in planned.groups)
        settings = FitSettings(planned.plan.ranks, groups, calibrated.terms.gram if job.kind.gradients else None)
        of_linears = partial(fit_layer_, calibrated.walk, student.model, settings)

    def make(layer: Layer) -> dict[str, LinearFit]:
        # experts first: linears of their layer can then be fitted to take back what those do
        return {**cut_stacks(layer), **of_linears(layer)}

    of = len(job.anatomy.layers)
    if calibrated.walk is not None and job.targets:
        assert calibrated.walk.whole or not job.outline.drops, "no layer takes back what the teacher itself lost"
        begin_(calibrated.walk, None if begins is None else enter(begins, job.batches))
        job.progress(Progress("fit layers", 0, of, "layers"))
        return make_layers_(
            calibrated.walk,
            student,
            make,
            job.teach,
            lambda layer: job.progress(Progress("fit layers", layer.index + 1, of, "layers")),
        )
    fitted: dict[str, LinearFit] = {}
    for layer in job.anatomy.layers:
        if layer.call == 0:
            fitted |= make(layer)
    return LayersReport(fitted)


def cut_layer_(terms: Terms, planned: RankAssignment, student: nn.Module, layer: Layer) -> dict[str, LinearFit]:
    """Factors that were kept, cut at their ranks, in the place of a layer's linears."""
    inside = layer.linears
    fitted: dict[str, LinearFit] = {}
    for name, rank in planned.items.ranks.items():
        linears = planned.linears_of(name)
        if rank is None or linears[0] not in inside:
            continue
        factors = terms.factors(name, rank)
        fitted |= dict.fromkeys(linears, LinearFit(factors.error, factors.fallback))
        replace_linears_(student, linears, factors)
    return fitted


def cut_stacks_(
    terms: Terms, planned: RankAssignment, student: nn.Module, anatomy: Anatomy, layer: Layer
) -> dict[str, LinearFit]:
    """Factors of experts that were kept, cut at their ranks, in the place of a layer's stacks."""
    ways = {group.stack: group for group in planned.groups if isinstance(group, SharedStack)}
    fitted: dict[str, LinearFit] = {}
    for stack in anatomy.stacks_of(layer):
        way = ways.get(stack.name)
        item = stack.name if way is None else way.name
        rank = planned.items.ranks[item]
        if rank is not None:
            spectrum = terms.spectrum(item)
            replace_stack_(student, stack, terms.stack_factors(item, rank), "" if way is None else way.side)
            fitted[stack.name] = LinearFit(spectrum.relative_error(rank), spectrum.fallback)
    return fitted


def report(
    job: FactorizationJob,
    calibrated: CalibrationResult,
    student: PreTrainedModel,
    planned: RankAssignment,
    made: LayersReport,
) -> FactorizeReport:
    """What was done."""
    fallbacks = {name: one.fallback for name, one in made.fitted.items() if one.fallback is not None}
    errors = {name: one.error for name, one in made.fitted.items()}
    found = make_report(student, planned.plan, errors, fallbacks, job.outline, job.candidates.left, planned.found)
    spectra = tuple(_curves(job, calibrated, planned))
    return replace(found, lessons=made.lessons, spectra=spectra, tokens=tokens_read(job))


def _curves(job: FactorizationJob, calibrated: CalibrationResult, planned: RankAssignment) -> Iterator[ErrorCurve]:
    """Of everything that has a rank and a spectrum, with that rank and its break-even among the points."""
    sizes = all_sizes(job.sizes, planned.groups)
    for name, rank in planned.items.ranks.items():
        table = calibrated.tables.parts.get(name)
        if table is not None:
            spectrum = table.spectrum
        elif calibrated.terms.is_decomposed(name):
            spectrum = calibrated.terms.spectrum(name)
        else:
            continue
        yield thin(name, spectrum, (sizes[name].break_even, *([] if rank is None else [rank])))


def linear_sizes(teacher: nn.Module, anatomy: Anatomy) -> list[LinearSize]:
    """What rank allocation knows of each factorizable linear and stack of experts; `teacher` may be empty."""
    sizes = []
    for name in anatomy.linears:
        linear = teacher.get_submodule(name)
        out_features, in_features = linear_shape(linear)
        sizes.append(LinearSize(name, out_features, in_features, getattr(linear, "bias", None) is not None))
    return [
        *sizes,
        *(
            LinearSize(stack.name, stack.out_features, stack.in_features, stack.has_bias, stack.experts)
            for stack in anatomy.stacks
        ),
    ]
