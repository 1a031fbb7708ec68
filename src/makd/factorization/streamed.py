"""Station 3, streamed: from a teacher's safetensors to a student's, one matrix at a time.

    layer by layer: moments -> matrix by matrix: decomposition, kept on disk -> ranks under the budget -> shards

The student is that of `makd.factorize` for the same settings and share_input `never`. At no time is more than one layer
of the teacher in memory (with solver `svd`, more than one matrix), and nothing that was kept on disk is computed again.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, count_experts
from makd.capture import examine
from makd.errors import SettingError
from makd.factorization.assemble import linear_sizes
from makd.factorization.outcome import FactorizeReport, make_report
from makd.factorization.settings import FactorizeConfig
from makd.factorization.streamed_calibration import LayerByLayer, check_one_stack
from makd.factorization.streamed_student import write_student
from makd.factorization.workfolder import WorkFolder
from makd.ranks.allocation import RANK_RULES, LinearSize, RankPlan, allocate, smallest_parameters
from makd.ranks.budget import Budget
from makd.solvers import SOLVERS, decompose_svd, decompose_whitened
from makd.solvers.factors import Decomposition
from makd.student.hub import count_parameters
from makd.student.linear import dense_weight
from makd.student.roundtrip import check_round_trip
from makd.weights.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

STREAMABLE = ("svd", "whitened")
"""Solvers that look at one linear and its inputs, and at nothing that comes after it."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Job:
    """What the steps share."""

    checkpoint: Checkpoint
    anatomy: Anatomy
    work: WorkFolder
    device: torch.device
    whole_spectra: bool
    """Whether ranks follow from spectra: else only the terms that are kept are computed."""
    kept_ranks: Mapping[str, int | None]
    """Linear -> the largest rank that it may get, 0 to keep its spectrum only; None where nothing is asked for."""
    progress: Progress


def check_streamable(settings: FactorizeConfig) -> None:
    """Whether a student can be made so from files to files.

    Raises:
        SettingError: it cannot; the text says what can.
    """
    solver = settings.solver
    if settings.vocabulary == "factored" or settings.depth not in ("auto", "all"):
        raise SettingError(
            f"Factored vocabularies and dropped layers cannot be streamed (vocabulary is {settings.vocabulary!r}, "
            f"depth {settings.depth!r}). Leave both at auto, with a budget that the linears can meet."
        )
    if settings.share_input == "always":
        raise SettingError(
            "factorize.share_input always cannot be streamed: every matrix is factored by itself. Leave it at auto, "
            "which is never here."
        )
    if solver not in STREAMABLE:
        raise SettingError(
            f"Solver {solver!r} cannot stream: it looks at what comes after a layer, or at the student before it. "
            f"These can: {', '.join(STREAMABLE)}. Give --recipe.factorize.solver whitened."
        )


def stream_student(
    model: PreTrainedModel,
    folder: Path,
    budget: Budget,
    settings: FactorizeConfig,
    work: Path,
    output: Path,
    identity: Mapping[str, Any],
    calibration: Sequence[Mapping[str, Tensor]] = (),
    device: torch.device | None = None,
    on_progress: Progress | None = None,
    dtype: torch.dtype | None = None,
) -> FactorizeReport:
    """Write a student of the teacher in `folder` into `output`.

    Args:
        model: the teacher's architecture, empty (`makd.loading.load_empty_model`). It becomes the (empty) student.
        folder: with the teacher's safetensors.
        budget: how many parameters the student may have.
        settings: solver and ranks.
        work: folder that keeps what is done, until the caller removes it.
        output: where the student's weights and configs are written, when all else is done.
        identity: what else makes this work another one than what stands in `work`, as JSON knows it.
        calibration: model inputs, for solvers that need text.
        device: where layers are run and matrices decomposed; None is the CPU.
        on_progress: called with (what, done, of) as the work goes on.
        dtype: of the student's files; None is that of `model`.

    Raises:
        BudgetError: the budget is above the teacher or below the smallest student.
        NumericsError: weights or activations hold NaN or infinity.
        DataError: the solver needs calibration and got none.
        ModelLoadError: the files are not whole, or cannot be streamed.
        OutputError: `work` holds the work of other settings.
        SettingError: the solver cannot stream, or not this model.
    """
    check_streamable(settings)
    started = time.perf_counter()
    anatomy = examine(model)  # without its weights no forward is tried: shapes are looked at layer by layer
    if SOLVERS[settings.solver].needs_text:
        check_one_stack(anatomy)
        logger.info(
            "%s is not tried out, since its weights are on disk: that linears read rows by tokens is checked batch by "
            "batch, that padding has no influence is not",
            type(model).__name__,
        )
    check_round_trip(model, anatomy.linears)
    sizes = linear_sizes(model, anatomy)
    counts = count_parameters(model)["total"], sum(size.parameters(None) for size in sizes)
    allowance = budget.allowance(*counts, smallest_parameters(sizes), count_experts(model, anatomy))
    uniform = allocate(sizes, allowance, "uniform", rank_multiple=settings.rank_multiple)
    checkpoint = Checkpoint(folder, model)
    job = _Job(
        checkpoint,
        anatomy,
        WorkFolder(work, identity),
        device or torch.device("cpu"),
        RANK_RULES[settings.rank_rule].needs_spectra,
        _kept_ranks(settings, sizes, uniform),
        on_progress or (lambda what, done, of: None),
    )
    if not job.work.is_checked:
        checkpoint.check_finite()
        job.work.note_checked()
    clock = {"calibrate": 0.0}
    if SOLVERS[settings.solver].needs_text:
        _decompose_layer_by_layer(job, calibration, clock)
    else:
        for name in _missing(job, anatomy.linears):
            _decompose(job, name, partial(decompose_svd, rank=_terms(job, name)))
    plan = uniform
    if RANK_RULES[settings.rank_rule].needs_spectra:
        spectra = {name: job.work.read_matrix(name).singular_values for name in anatomy.linears}
        plan = allocate(sizes, allowance, settings.rank_rule, spectra=spectra, rank_multiple=settings.rank_multiple)
    write_student(
        checkpoint,
        plan,
        job.work,
        output,
        dtype or model.dtype,
        lambda done, of: job.progress("write shards", done, of),
    )
    seconds = {**clock, "factorize": time.perf_counter() - started - clock["calibrate"]}
    return replace(_report(model, plan, job.work), seconds=seconds)


def _kept_ranks(settings: FactorizeConfig, sizes: Sequence[LinearSize], uniform: RankPlan) -> dict[str, int | None]:
    if RANK_RULES[settings.rank_rule].needs_spectra:
        return {size.name: size.break_even for size in sizes}
    return dict(uniform.ranks)


def _missing(job: _Job, linears: Sequence[str]) -> list[str]:
    """Linears whose decomposition is wanted and not there yet."""
    return [name for name in linears if job.kept_ranks[name] is not None and not job.work.has_matrix(name)]


def _terms(job: _Job, name: str) -> int | None:
    """How many terms of a linear are asked for; None for all."""
    return None if job.whole_spectra else job.kept_ranks[name]


def _decompose(job: _Job, name: str, solve: Callable[[Tensor], Decomposition]) -> None:
    with job.checkpoint.filled([f"{name}.weight"], job.device):
        decomposition = solve(dense_weight(job.checkpoint.model.get_submodule(name)))
    job.work.write_matrix(name, decomposition, job.kept_ranks[name] or 0)
    wanted = [linear for linear, rank in job.kept_ranks.items() if rank is not None]
    job.progress("decompose", sum(job.work.has_matrix(linear) for linear in wanted), len(wanted))


def _decompose_layer_by_layer(job: _Job, calibration: Sequence[Mapping[str, Tensor]], clock: dict[str, float]) -> None:
    layers = job.anatomy.layers
    linears = {layer.index: tuple(dict.fromkeys(linear.module for linear in layer.roles.values())) for layer in layers}
    if not _missing(job, job.anatomy.linears):
        return
    last = max(index for index, names in linears.items() if _missing(job, names))
    started = time.perf_counter()
    calibrated = LayerByLayer(job.checkpoint, job.anatomy, calibration, job.work, job.device)
    clock["calibrate"] += time.perf_counter() - started
    for layer in layers[: last + 1]:
        missing = _missing(job, linears[layer.index])
        went_on = any(job.work.has_states(other) for other in range(layer.index + 1, len(layers)))
        if not missing and went_on:
            job.work.finish_layer(layer.index)
            continue
        if not (job.work.has_statistics(layer.index) and (went_on or layer.index == len(layers) - 1)):
            started = time.perf_counter()
            calibrated.run(layer, linears[layer.index])
            clock["calibrate"] += time.perf_counter() - started
            job.progress("calibrate", layer.index + 1, len(layers))
        for name in missing:
            _decompose(job, name, partial(_whitened, job, layer.index, name))
        job.work.finish_layer(layer.index)


def _whitened(job: _Job, layer: int, name: str, weight: Tensor) -> Decomposition:
    return decompose_whitened(weight, job.work.read_gram(layer, name).to(job.device), _terms(job, name))


def _report(model: PreTrainedModel, plan: RankPlan, work: WorkFolder) -> FactorizeReport:
    errors, fallbacks = {}, {}
    for name, rank in plan.ranks.items():
        if rank is not None:
            matrix = work.read_matrix(name)
            errors[name] = matrix.relative_error(rank)
            if matrix.fallback is not None:
                fallbacks[name] = matrix.fallback
    return make_report(model, plan, errors, fallbacks)
