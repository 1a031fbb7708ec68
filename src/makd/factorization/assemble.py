"""Station 3: from what calibration kept to one student: ranks under the budget -> factors -> a copy with them in it.

Students that differ in their ranks alone are assembled from the same calibration.
"""

import copy
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, linear_shape, resolve
from makd.calibration.frame import Frame
from makd.calibration.source import ModelSource
from makd.calibration.walk import Walk
from makd.factorization.calibrate import Calibrated, Job
from makd.factorization.fit import FitSettings, Fitted, depth_sensitivities, fit_layers_
from makd.factorization.outcome import FactorizeReport, make_report
from makd.factorization.vocabulary import replace_tables_
from makd.ranks.allocation import LinearSize
from makd.ranks.planning import Planned, plan_ranks
from makd.student.linear import LowRankLinear
from makd.student.shared_linear import share_linears_


def plan(job: Job, calibrated: Calibrated) -> Planned:
    """Ranks under the budget, and which linears share one A."""
    worth = depth_sensitivities(job.anatomy) if job.kind.in_forward_order else {}
    worth |= {table.module: job.outline.emphasis for table in job.outline.tables}
    question = job.question(worth, calibrated.tables, calibrated.terms.wanted.most)
    return plan_ranks(question, calibrated.terms.groups(), calibrated.terms.spectra)


def assemble(job: Job, calibrated: Calibrated) -> PreTrainedModel:
    """The student that the job's outline draws, with its report as `student.factorization`."""
    planned = plan(job, calibrated)
    student: PreTrainedModel = copy.deepcopy(job.source.model)
    student.eval()
    ranks = planned.plan.ranks
    factors = replace_tables_(student, job.outline.tables, ranks, calibrated.tables)
    fitted = {name: Fitted(one.error, one.fallback) for name, one in factors.items()}
    if job.kind.in_forward_order:
        assert calibrated.walk is not None
        for entry in ("student", "done/student"):  # of another student of this calibration
            calibrated.store.remove(entry)
        begin_(calibrated.walk, student if factors else None)
        settings = FitSettings(ranks, frozenset(group.linears for group in planned.groups), calibrated.terms.gram)
        of = len(job.anatomy.layers)
        fitted |= fit_layers_(
            calibrated.walk, ModelSource(student), settings,
            lambda layer: job.progress("fit layers", layer.index + 1, of),
        )  # fmt: skip
    else:
        fitted |= _replace_linears_(student, planned, calibrated)
    student.factorization = report(job, student, planned, fitted)  # type: ignore[assignment]
    return student


def begin_(walk: Walk, student: PreTrainedModel | None) -> None:
    """The hidden states that enter the student's first layer, into the walk's store: the teacher's, or its own.

    Args:
        walk: through the teacher.
        student: has embeddings of its own; None where they are the teacher's.
    """
    if walk.store.is_marked("student/0000"):
        return
    frame = None if student is None else Frame(ModelSource(student), resolve(student))
    for index, batch in enumerate(walk.batches):
        entering = walk.states(0, index) if frame is None else frame.enter(batch).entering
        walk.store.write(f"student/0000/{index:05}", {"hidden": entering})
    walk.store.mark("student/0000")


def _replace_linears_(student: PreTrainedModel, planned: Planned, calibrated: Calibrated) -> dict[str, Fitted]:
    fitted: dict[str, Fitted] = {}
    members = {group.name: group.linears for group in planned.groups}
    for name, rank in planned.items.ranks.items():
        if rank is None or name in calibrated.tables:
            continue
        factors = calibrated.terms.factors(name, rank)
        told = Fitted(factors.error, factors.fallback)
        if name in members:
            share_linears_(student, members[name], factors)
            fitted |= dict.fromkeys(members[name], told)
            continue
        fitted[name] = told
        bias = getattr(student.get_submodule(name), "bias", None)
        layer = LowRankLinear.from_factors(factors, None if bias is None else bias.detach())
        student.set_submodule(name, layer.eval())
    return fitted


def report(job: Job, student: PreTrainedModel, planned: Planned, fitted: Mapping[str, Fitted]) -> FactorizeReport:
    """What was done."""
    fallbacks = {name: one.fallback for name, one in fitted.items() if one.fallback is not None}
    errors = {name: one.error for name, one in fitted.items()}
    return make_report(student, planned.plan, errors, fallbacks, job.outline, job.plot.left, planned.found)


def linear_sizes(teacher: nn.Module, anatomy: Anatomy) -> list[LinearSize]:
    """What rank allocation knows of each factorizable linear; `teacher` may be empty."""
    sizes = []
    for name in anatomy.linears:
        linear = teacher.get_submodule(name)
        out_features, in_features = linear_shape(linear)
        sizes.append(LinearSize(name, out_features, in_features, getattr(linear, "bias", None) is not None))
    return sizes
