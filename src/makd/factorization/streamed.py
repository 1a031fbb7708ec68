"""Station 3, from files to files: the walk of `factorize` through a teacher that is never in memory whole.

    safetensors -> a layer at a time: states, moments, spectra, factors, all kept on disk -> shards of the student

The student is that of `makd.factorize` for the same settings. What is kept on disk is not made again: a run that was
killed goes on at the layer where it was.
"""

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.calibration.entries import FILES_CHECKED
from makd.calibration.replay import NotLayerByLayer
from makd.calibration.source import FileSource
from makd.calibration.store import DiskStore
from makd.capture import examine
from makd.errors import DataError, SettingError
from makd.factorization.allocator import giving_back
from makd.factorization.assemble import linear_sizes, make_, plan, report
from makd.factorization.calibrate import CalibrationResult, FactorizationJob, calibrate, warn_if_little_text
from makd.factorization.layers import LayersReport, LinearFit, TeachLayer
from makd.factorization.outcome import FactorizeReport
from makd.factorization.outline import Outline, find_candidates
from makd.factorization.settings import FactorizeConfig
from makd.factorization.student_files import StudentFiles, factor_sources, learned_sources, write_student
from makd.factorization.work import Work
from makd.progress import OnProgress, Progress, nobody
from makd.ranks.budget import Budget
from makd.ranks.planning import RankAssignment
from makd.solvers import SOLVERS
from makd.student.roundtrip import check_round_trip
from makd.weights.on_disk import Checkpoint

logger = logging.getLogger(__name__)


def check_streamable(settings: FactorizeConfig) -> None:
    """Refuse settings that no student can be made by from files to files.

    Raises:
        SettingError: vocabulary, depth, experts or store are such; the text says what can be.
    """
    if settings.vocabulary == "factored" or settings.depth not in ("auto", "all"):
        raise SettingError(
            f"Factored vocabularies and dropped layers cannot be streamed (vocabulary is {settings.vocabulary!r}, "
            f"depth {settings.depth!r}). Leave both at auto, with a budget that the linears can meet."
        )
    if settings.experts == "factored":
        raise SettingError("Routed experts of a streamed model stay dense: leave factorize.experts at auto.")
    if settings.store == "memory":
        raise SettingError("A streamed factorization keeps its states on disk: leave factorize.store at auto.")


@giving_back()
def stream_student(
    model: PreTrainedModel,
    folder: Path,
    budget: Budget,
    settings: FactorizeConfig,
    work: Work,
    output: Path,
    calibration: Sequence[Mapping[str, Tensor]] = (),
    device: torch.device | None = None,
    on_progress: OnProgress | None = None,
    dtype: torch.dtype | None = None,
    teach: TeachLayer | None = None,
) -> tuple[PreTrainedModel, FactorizeReport]:
    """Write a student of the teacher in `folder` into `output`.

    Args:
        model: the teacher's architecture, empty (`makd.loading.load_empty_model`).
        folder: with the teacher's safetensors.
        budget: how many parameters the student may have.
        settings: solver and ranks.
        work: keeps what is done, until the caller removes it.
        output: where the student's weights and configs are written, when all else is done.
        calibration: model inputs, for solvers that need text.
        device: where layers are run and matrices decomposed; None is the CPU.
        on_progress: called with a `Progress` after each unit of work.
        dtype: of the student's files; None is that of `model`.
        teach: teaches each layer when it has its factors.

    Returns:
        The student, empty, and what was done.

    Raises:
        BudgetError: the budget is above the teacher or below the smallest student.
        NumericsError: weights or activations hold NaN or infinity.
        DataError: the solver needs calibration and got none.
        ModelLoadError: the files are not whole, or cannot be streamed.
        OutputError: `work` holds the work of other settings.
        SettingError: settings cannot be streamed, or the solver does not fit this model.
    """
    check_streamable(settings)
    started = time.perf_counter()
    # without its weights no forward is tried: shapes are looked at layer by layer
    anatomy = settings.with_experts(examine(model), streamed=True)
    settings = settings.for_model(anatomy)
    kind = SOLVERS[settings.solver]
    if kind.needs_text or teach is not None:
        if not calibration:
            raise DataError("Calibration needs at least one batch; it got none. Is the data empty?")
        logger.info(
            "%s is not tried out, since its weights are on disk: that linears read rows by tokens is checked batch by "
            "batch, that padding has no influence is not",
            type(model).__name__,
        )
    check_round_trip(model, anatomy)
    sizes = linear_sizes(model, anatomy)
    candidates = find_candidates(model, anatomy, sizes, budget, "dense", "all", settings.rank_multiple, kind.needs_text)
    checkpoint, device = Checkpoint(folder, model), device or torch.device("cpu")
    checks = work.store()
    if not checks.is_marked(FILES_CHECKED):
        checkpoint.check_finite()
        checks.mark(FILES_CHECKED)
    progress = on_progress or nobody
    source = FileSource(checkpoint, anatomy, device)
    job = FactorizationJob(
        source, anatomy, Outline(), candidates, replace(settings, store="disk"), calibration, progress, teach, work
    )
    warn_if_little_text(job)
    try:
        calibrated = calibrate(job)
    except NotLayerByLayer as error:
        raise SettingError(
            f"Solver {settings.solver!r} streams a model layer by layer. {error} Take solver 'svd', which looks at its "
            "weights alone, or a machine that it fits into."
        ) from error
    planned, store = plan(job, calibrated), calibrated.store
    assert isinstance(store, DiskStore)
    student = copy.deepcopy(model)
    learns = kind.in_forward_order or teach is not None
    if learns:
        made = make_(job, calibrated, planned, StudentFiles(checkpoint, student, store, device))
        sources = learned_sources(store, len(anatomy.layers))
    else:
        made = LayersReport(_fits(calibrated, planned))
        sources = factor_sources(store, planned, {size.name: size.out_features for size in job.sizes})
    write_student(
        checkpoint, student, planned, sources, output, dtype or model.dtype,
        lambda done, of: progress(Progress("write shards", done, of, "tensors")),
    )  # fmt: skip
    total = time.perf_counter() - started
    seconds = {"calibrate": calibrated.seconds, "factorize": total - calibrated.seconds}
    return student, replace(report(job, calibrated, student, planned, made), seconds=seconds)


def _fits(calibrated: CalibrationResult, planned: RankAssignment) -> dict[str, LinearFit]:
    """How well factors fit that are cut from those that were kept."""
    fitted: dict[str, LinearFit] = {}
    for item, rank in planned.items.ranks.items():
        if rank is not None:
            spectrum = calibrated.terms.spectrum(item)
            fit = LinearFit(spectrum.relative_error(rank), spectrum.fallback)
            fitted |= dict.fromkeys(planned.linears_of(item), fit)
    return fitted
