"""Station 3, the whole of it: teacher + budget + calibration text -> student.

    settings and budget -> outlines, one or some to try -> `assemble` a student of each -> the nearest to the teacher

An outline says whether embeddings and head get factors too, and which layers go; under a small budget some are tried.

What was asked for and not done (a linear that stays dense, statistics that needed a fallback) is in the report.
"""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, SkippedLayer, StandIn, resolve
from makd.anatomy.batches import check_batches
from makd.anatomy.eval_mode import in_eval
from makd.calibration.counted import CountedBatches
from makd.calibration.replay import NotLayerByLayer
from makd.calibration.source import ModelSource
from makd.calibration.walk import Walk
from makd.capture import examine
from makd.devices import check_float64
from makd.errors import BudgetError, DataError, SettingError
from makd.factorization.allocator import giving_back
from makd.factorization.assemble import assemble, free_intermediates, linear_sizes, reset_student
from makd.factorization.calibrate import (
    CalibrationResult,
    FactorizationJob,
    calibrate,
    walk_whole,
    warn_if_little_text,
)
from makd.factorization.depth import skipping
from makd.factorization.drift import choose_probes, drift
from makd.factorization.layers import TeachLayer
from makd.factorization.outcome import FactorizeReport
from makd.factorization.outline import EMPHASES, Candidates, find_candidates
from makd.factorization.settings import FactorizeConfig
from makd.factorization.work import Work
from makd.kinds import takes
from makd.progress import OnProgress, nobody
from makd.random_state import keeping_random_state
from makd.ranks.allocation import RANK_RULES
from makd.ranks.budget import Budget
from makd.solvers import SOLVERS
from makd.student.hub import mark_student
from makd.student.roundtrip import check_round_trip
from makd.weights.sound import check_finite, check_merged, check_plain

logger = logging.getLogger(__name__)


@takes
def factorize(
    teacher: PreTrainedModel,
    budget: Budget,
    *,
    solver: str = "auto",
    ranks: str = "auto",
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    rank_multiple: int | None = None,
    share_input: str = "auto",
    experts: str = "auto",
    vocabulary: str = "auto",
    depth: int | str = "auto",
    store: str = "auto",
    teach: TeachLayer | None = None,
    on_progress: OnProgress | None = None,
) -> PreTrainedModel:
    """A smaller copy of `teacher`: its linears replaced by low-rank factors within `budget`.

    The classifier and pooler stay as they are; embeddings, head and depth too, unless the budget is too small for that
    or the settings say otherwise. The teacher is not changed.

    Args:
        teacher: any model that `makd.inspect` understands, in float32, bfloat16 or float16.
        budget: how many parameters the student may have.
        solver: one of `SOLVERS`, or `auto` for the best that the model allows; all but `svd` need `calibration`.
        ranks: one of `RANK_RULES`, or `auto` for the one that suits the solver.
        calibration: model inputs as a DataLoader gives them.
        rank_multiple: what every rank is a multiple of; None: of 8, but for the last few parameters of the budget.
        share_input: whether linears that read the same input share one A, and experts a factor: `auto`, `never` or
            `always`.
        experts: whether routed experts get factors: see `FactorizeConfig`.
        vocabulary: whether embeddings and LM head get factors: see `FactorizeConfig`.
        depth: how many layers stay: see `FactorizeConfig`.
        store: where hidden states of the text are kept meanwhile: see `FactorizeConfig`.
        teach: called with each layer when it has its factors, before the next is made: see `makd.distill.LayerTeacher`.
        on_progress: called with a `Progress` after each unit of work.

    Returns:
        The student, on the teacher's device and in its dtype, in eval mode; `student.factorization` is the
        `FactorizeReport`.

    Raises:
        BudgetError: the budget is above the teacher or below the smallest student that the settings allow.
        NumericsError: weights or activations hold NaN or infinity.
        DataError: the solver needs calibration and got none, or it does not reach every linear.
        SettingError, UnknownNameError: a setting is not allowed; or the teacher is on a device without float64.
        UnsupportedModelError: the teacher's linears cannot be told apart, it does not read token ids, or the solver
            looks at what it does not show.
    """
    settings = FactorizeConfig(
        solver=solver,
        ranks=ranks,
        rank_multiple=rank_multiple,
        share_input=share_input,
        experts=experts,
        vocabulary=vocabulary,
        depth=depth,
        store=store,
    )
    student, report = make_student(teacher, budget, settings, calibration, teach, on_progress)
    student.factorization = report  # type: ignore[assignment] # torch takes what is set on a module for a part of it
    return student


def check_dense(teacher: PreTrainedModel) -> None:
    """Refuse to factorize a student, or a model with adapters, whose weights are not all that it applies.

    Raises:
        SettingError: the teacher is a student.
        ModelLoadError: it has adapters.
    """
    check_merged(teacher)
    stand_ins = [module for module in teacher.modules() if isinstance(module, StandIn)]
    if not all(isinstance(module, SkippedLayer) for module in stand_ins):
        raise SettingError("The teacher is factored already. Factorize the dense model that it was made from.")
    if stand_ins:
        raise SettingError(
            "The teacher does without some of its layers. `makd export STUDENT --to dense` makes an ordinary model "
            "of it, with as many layers as it runs: take that."
        )


def check_factorizable(
    teacher: PreTrainedModel, budget: Budget, settings: FactorizeConfig, *, has_text: bool
) -> tuple[Anatomy, FactorizeConfig, Candidates]:
    """Refuse a teacher that no such student can be made of: all that is known before any text is read.

    Args:
        teacher: as for `factorize`.
        budget: likewise.
        settings: solver, ranks and the rest.
        has_text: whether there are calibration batches.

    Returns:
        What of the teacher is factorized; the settings with the solver that they stand for; the outlines to try.

    Raises:
        MakdError: as `factorize` raises it.
    """
    check_dense(teacher)
    check_plain(teacher)
    check_float64(teacher.device)
    anatomy = settings.with_experts(examine(teacher))
    check_finite(teacher, "The teacher")
    check_round_trip(teacher, anatomy)
    made = settings.for_model(anatomy)
    candidates = find_candidates(
        teacher, anatomy, linear_sizes(teacher, anatomy), budget, settings.vocabulary, settings.depth,
        settings.rank_multiple, has_text, made.by_frequency,
    )  # fmt: skip
    if SOLVERS[made.solver].needs_text and not has_text:
        raise DataError(
            f"Solver {made.solver!r} needs calibration batches (model inputs, as a DataLoader gives them). "
            "Give `calibration`, or take solver 'svd', which needs none."
        )
    return anatomy, made, candidates


@keeping_random_state()
def make_student(
    teacher: PreTrainedModel,
    budget: Budget,
    settings: FactorizeConfig,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    teach: TeachLayer | None = None,
    on_progress: OnProgress | None = None,
    work: Work | None = None,
) -> tuple[PreTrainedModel, FactorizeReport]:
    """The student of `factorize` for these settings, with its report beside it; raises what that raises.

    Args:
        teacher: as for `factorize`.
        budget: likewise.
        settings: solver, ranks and the rest.
        calibration: as for `factorize`.
        teach: likewise.
        on_progress: likewise.
        work: where what is done is kept, if states are kept on disk; a process that was killed is gone on with there.
            The caller removes it. None keeps nothing.

    Raises:
        OutputError: `work` holds the work of something else.
    """
    started = time.perf_counter()
    progress, asked = on_progress or nobody, settings
    anatomy, settings, candidates = check_factorizable(teacher, budget, settings, has_text=calibration is not None)
    for note in anatomy.notes:
        logger.info("%s: %s", type(teacher).__name__, note)
    if teach is not None and calibration is None:
        raise DataError("Teaching layers on the way needs calibration batches: give `calibration`.")
    batches: Sequence[Mapping[str, Tensor]] = list(check_batches(calibration or (), teacher))
    if isinstance(calibration, CountedBatches):
        batches = calibration.replaced_by(batches)
    with in_eval(teacher), giving_back():
        try:
            student, report, calibrating = _nearest(
                teacher, anatomy, candidates, settings, batches, teach, progress, work
            )
        except NotLayerByLayer as error:
            if asked.solver != "auto":
                raise SettingError(
                    f"Solver {asked.solver!r} fits layer after layer. {error} Take solver 'two_sided', or 'whitened'."
                ) from error
            logger.warning(
                "Solver 'two_sided' in the place of 'two_sided_regression': %s Nothing is to be done; it measures a "
                "little worse before training",
                error,
            )
            settings = replace(settings, solver="two_sided")
            student, report, calibrating = _nearest(
                teacher, anatomy, candidates, settings, batches, teach, progress, work
            )
    mark_student(student)
    seconds = {"calibrate": calibrating, "factorize": time.perf_counter() - started - calibrating}
    return student, replace(report, seconds=seconds)


def _nearest(
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    candidates: Candidates,
    settings: FactorizeConfig,
    batches: Sequence[Mapping[str, Tensor]],
    teach: TeachLayer | None,
    progress: OnProgress,
    work: Work | None,
) -> tuple[PreTrainedModel, FactorizeReport, float]:
    """The student that keeps outputs nearest to the teacher's; fewer layers until it gets worse.

    Returns:
        The student, what was done, and the seconds of all calibrations.
    """
    probes = choose_probes(batches)
    if candidates.layers and not probes:
        raise DataError("Calibration needs at least one batch; it got none. Is the data empty?")
    by_spectra = RANK_RULES[settings.rank_rule].needs_spectra
    emphases = EMPHASES if candidates.tables and probes and by_spectra else (1.0,)
    best: tuple[PreTrainedModel, FactorizeReport] | None = None
    trials: dict[int, float] = {}
    whole: Walk | None = None
    calibrating = 0.0
    for outline in candidates.outlines(teacher, anatomy, probes):
        depth, nearest = len(anatomy.layers) - len(outline.drops), min(trials.values(), default=math.inf)
        job = FactorizationJob(
            ModelSource(teacher), anatomy, outline, candidates, settings, batches, progress, teach, work
        )
        if not trials:
            warn_if_little_text(job)
        begun = time.perf_counter()
        whole = whole or _walk_of_targets(job)
        calibrating += time.perf_counter() - begun
        calibrated, students = _made(teacher, job, whole, emphases)
        whole = whole or (calibrated.walk if job.targets else None)
        calibrating += calibrated.seconds
        distances: dict[float, float] = {}
        made = dict(zip(emphases, students, strict=True))
        for emphasis, (student, report) in made.items():
            if not candidates.is_search and len(emphases) == 1:
                if not candidates.tables:  # their decompositions are made from states
                    free_intermediates(calibrated)
                return student, report, calibrating
            distances[emphasis] = drift(student, teacher, anatomy, probes)
            logger.info("%d layers, emphasis %g: %.4g from the teacher's outputs", depth, emphasis, distances[emphasis])
        emphases = (min(distances, key=distances.__getitem__),)
        trials[depth] = distances[emphases[0]]
        if trials[depth] >= nearest:
            break
        best = made[emphases[0]]
        if not candidates.is_search:
            return *best, calibrating
        del job, calibrated  # what they keep is as much as the next depth's
    if best is None:  # layers of several sizes: `find_candidates` looked at the largest, and others were the ones to go
        raise BudgetError(
            f"A budget of {candidates.limit:,} parameters is below the smallest student without the {candidates.drops} "
            "layers that are missed least. Give a larger one, or a smaller factorize.depth."
        )
    student, report = best
    return student, replace(report, trials=trials), calibrating


def _walk_of_targets(job: FactorizationJob) -> Walk | None:
    """Through the teacher with all its layers, where the student does without some and has targets."""
    return walk_whole(job) if job.outline.drops and job.targets else None


def _made(
    teacher: PreTrainedModel, job: FactorizationJob, whole: Walk | None, emphases: Sequence[float]
) -> tuple[CalibrationResult, list[tuple[PreTrainedModel, FactorizeReport]]]:
    """What was kept of the teacher without the layers that go, and the students made of it."""
    with skipping(teacher, job.outline.dropped, job.outline.outputs):
        inside = resolve(teacher)
        inside = replace(inside, stacks=tuple(stack for stack in inside.stacks if stack in job.anatomy.stacks))
        job = replace(job, anatomy=inside)
        calibrated = calibrate(job, whole)
        return calibrated, _students(job, calibrated, emphases)


def _students(
    job: FactorizationJob,
    calibrated: CalibrationResult,
    emphases: Sequence[float],
) -> list[tuple[PreTrainedModel, FactorizeReport]]:
    """A student of each emphasis of the vocabulary, and what was done."""
    students = []
    for emphasis in emphases:
        if len(emphases) > 1:
            reset_student(calibrated)
        students.append(assemble(replace(job, outline=replace(job.outline, emphasis=emphasis)), calibrated))
    return students
