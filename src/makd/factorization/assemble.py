"""Station 3, the heart of it: one student.

    `calibrate`: moments of inputs and gradients
    `assemble`: decompositions -> ranks under the budget -> factors -> a copy with them in it

Students that differ in their ranks alone are assembled from the same moments.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, linear_shape, resolve
from makd.calibration.gradients import collect_gradient_moments
from makd.calibration.moments import InputMoments
from makd.calibration.statistics import collect_input_moments
from makd.factorization.depth import skipping
from makd.factorization.layerwise import depth_sensitivities, fit_layers_
from makd.factorization.outcome import FactorizeReport, make_report
from makd.factorization.outline import Outline, Plot
from makd.factorization.settings import FactorizeConfig
from makd.factorization.vocabulary import decompose_tables, replace_tables_, table_size
from makd.ranks.allocation import RANK_RULES, LinearSize
from makd.ranks.planning import Planned, Question, plan_ranks
from makd.ranks.sharing import InputGroup, find_groups
from makd.solvers import (
    SOLVERS,
    Solver,
    decompose_fisher,
    decompose_svd,
    decompose_two_sided,
    decompose_whitened,
)
from makd.solvers.factors import Decomposition, Factors
from makd.solvers.parallel import map_on_cores
from makd.solvers.svd import stack
from makd.student.linear import LowRankLinear, dense_weight
from makd.student.shared_linear import share_linears_

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibrated:
    """What calibration found, by linear; empty where the solver does not look at it."""

    inputs: Mapping[str, InputMoments]
    gradients: Mapping[str, InputMoments]
    seconds: float

    def is_one_input(self, group: InputGroup) -> bool:
        """Whether the linears of a group read the same tensor in calibration; taken for granted without it."""
        return not self.inputs or len({id(self.inputs[name]) for name in group.linears}) == 1


def calibrate(
    teacher: PreTrainedModel,
    outline: Outline,
    plot: Plot,
    settings: FactorizeConfig,
    batches: Iterable[Mapping[str, Tensor]],
    progress: Progress,
) -> Calibrated:
    """The moments that a student of `outline` is made from. Arguments are those of `assemble`."""
    kind, started = SOLVERS[settings.solver], time.perf_counter()
    inputs, gradients = {}, {}
    with skipping(teacher, outline.dropped, outline.outputs):
        anatomy = resolve(teacher)
        compares = settings.share_input == "auto" and bool(find_groups(anatomy, plot.parts.sizes(outline)))
        spectra_wanted = RANK_RULES[settings.rank_rule].needs_spectra or not kind.in_forward_order or compares
        head = next((table.head for table in outline.tables if table.head is not None), None)
        if kind.inputs and (spectra_wanted or head is not None):
            inputs = collect_input_moments(teacher, anatomy, _counted("calibrate", batches, progress), head)
        if kind.gradients:
            embeddings = {
                table.module: table_size(teacher, table).in_features for table in outline.tables if table.embeds
            }
            counted = _counted("gradients", batches, progress)
            gradients = collect_gradient_moments(teacher, anatomy, counted, embeddings=embeddings)
    return Calibrated(inputs, gradients, time.perf_counter() - started)


def assemble(
    teacher: PreTrainedModel,
    outline: Outline,
    plot: Plot,
    settings: FactorizeConfig,
    calibrated: Calibrated,
    batches: Iterable[Mapping[str, Tensor]],
    progress: Progress,
) -> PreTrainedModel:
    """The student that `outline` draws, with its report as `student.factorization`.

    Args:
        teacher: in eval mode.
        outline: what gets factors, and which layers go.
        plot: the budget, and the sizes of everything.
        settings: solver and ranks.
        calibrated: moments of the teacher without the layers that go.
        batches: calibration; seen once, or as often as the solver needs if they are a list.
        progress: called with (what, done, of).
    """
    kind = SOLVERS[settings.solver]
    with skipping(teacher, outline.dropped, outline.outputs):
        anatomy, sizes = resolve(teacher), plot.parts.sizes(outline)
        groups: tuple[InputGroup, ...] = () if settings.share_input == "never" else find_groups(anatomy, sizes)
        groups = tuple(group for group in groups if calibrated.is_one_input(group))
        question = Question(
            sizes,
            plot.allowance(outline),
            settings.rank_rule,
            settings.rank_multiple,
            (depth_sensitivities(anatomy) if kind.in_forward_order else {})
            | {table.module: outline.emphasis for table in outline.tables},
            settings.share_input,
            not kind.in_forward_order,
            decompose_tables(teacher, outline.tables, kind, calibrated.inputs, calibrated.gradients, batches),
        )
        planned = plan_ranks(question, groups, partial(_decompose, teacher, groups, kind, calibrated, progress))
        student: PreTrainedModel = copy.deepcopy(teacher)
    student.eval()
    plan = planned.plan
    fitted = replace_tables_(student, outline.tables, plan.ranks, question.tables)
    if kind.in_forward_order:
        of = len(anatomy.layers)
        grams = {name: moments.gram for name, moments in calibrated.gradients.items()}
        shared = [group.linears for group in planned.groups]
        fitted |= fit_layers_(
            student, teacher, anatomy, plan.ranks, batches, grams, lambda done: progress("fit layers", done, of),
            shared=shared,
        )  # fmt: skip
    else:
        fitted |= _replace_linears_(student, planned)
    student.factorization = _report(student, planned, fitted, outline, plot.left)  # type: ignore[assignment]
    return student


def _counted(what: str, batches: Iterable[Mapping[str, Tensor]], progress: Progress) -> Iterator[Mapping[str, Tensor]]:
    """The batches, with word to the progress bar after each."""
    total = len(batches) if isinstance(batches, Sized) else 0
    for done, batch in enumerate(batches, start=1):
        yield batch
        progress(what, done, max(total, done))


def _decompose(
    teacher: PreTrainedModel,
    groups: Iterable[InputGroup],
    kind: Solver,
    calibrated: Calibrated,
    progress: Progress,
    wanted: Mapping[str, int | None],
) -> dict[str, Decomposition]:
    """Decompositions of linears, and of groups as one: of the terms up to the rank in `wanted`, or of all (None)."""
    members = {group.name: group.linears for group in groups}

    def decompose(name: str) -> Decomposition:
        linears, rank = members.get(name, (name,)), wanted[name]
        weight = stack([dense_weight(teacher.get_submodule(linear)) for linear in linears])
        if not kind.needs_text:
            return decompose_svd(weight, rank)
        grams = [calibrated.gradients[linear].gram for linear in linears] if kind.gradients else []
        if not kind.inputs:
            return decompose_fisher(weight, grams, rank)
        if not kind.gradients:
            return decompose_whitened(weight, calibrated.inputs[linears[0]].gram, rank)
        return decompose_two_sided(weight, calibrated.inputs[linears[0]].gram, grams, rank)

    decompositions = {}
    for name, found in zip(wanted, map_on_cores(decompose, wanted, teacher.device), strict=True):
        decompositions[name] = found
        progress("decompose", len(decompositions), len(wanted))
    return decompositions


def _replace_linears_(student: PreTrainedModel, planned: Planned) -> dict[str, Factors]:
    fitted: dict[str, Factors] = {}
    members = {group.name: group.linears for group in planned.groups}
    for name, rank in planned.items.ranks.items():
        if rank is None or name not in planned.decompositions:
            continue
        factors = planned.decompositions[name].factors(rank)
        if name in members:
            fitted |= share_linears_(student, members[name], factors)
            continue
        fitted[name] = factors
        bias = getattr(student.get_submodule(name), "bias", None)
        layer = LowRankLinear.from_factors(factors, None if bias is None else bias.detach())
        student.set_submodule(name, layer.eval())
    return fitted


def _report(
    student: PreTrainedModel,
    planned: Planned,
    fitted: Mapping[str, Factors],
    outline: Outline,
    left: Mapping[str, str],
) -> FactorizeReport:
    fallbacks = {name: factors.fallback for name, factors in fitted.items() if factors.fallback is not None}
    errors = {name: factors.error for name, factors in fitted.items()}
    return make_report(student, planned.plan, errors, fallbacks, outline, left, planned.found)


def linear_sizes(teacher: PreTrainedModel, anatomy: Anatomy) -> list[LinearSize]:
    """What rank allocation knows of each factorizable linear; `teacher` may be empty."""
    sizes = []
    for name in anatomy.linears:
        linear = teacher.get_submodule(name)
        out_features, in_features = linear_shape(linear)
        sizes.append(LinearSize(name, out_features, in_features, getattr(linear, "bias", None) is not None))
    return sizes
