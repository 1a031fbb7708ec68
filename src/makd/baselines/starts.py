"""Baselines: the low-rank students that methods begin from, made once for all that begin from the same one.

Those of a comparison differ in what they learn; a decoder's factorization takes longer than many of their trainings.
"""

import copy
import time
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from makd.aspects import Plan, Term, activate
from makd.baselines.method import Batches, PlannedStage, PreparedStudent, Start, prepared
from makd.capture import examine
from makd.factorization.factorize import check_factorizable, factorize
from makd.factorization.settings import FactorizeConfig
from makd.progress import OnProgress, nobody
from makd.ranks.budget import Budget


@dataclass(frozen=True)
class _LastStart:
    made_of: tuple[Budget, str, str]
    calibration: Batches | None
    teacher: int
    """Says whether the teacher's weights are what they were."""
    student: PreTrainedModel
    seconds: float


_LAST: "WeakKeyDictionary[PreTrainedModel, _LastStart]" = WeakKeyDictionary()
"""Of each teacher the last start, for the next method."""


def prepared_from(teacher: PreTrainedModel, start: Start, *stages: tuple[tuple[Term, ...], float]) -> PreparedStudent:
    """`prepared` from a start."""
    return replace(prepared(teacher, start.student, *stages), saved=start.saved)


def prepared_by(
    teacher: PreTrainedModel, start: Start, plan: Plan, trainable: Literal["all", "linears", "adapters"] | None = None
) -> PreparedStudent:
    """A start with one stage of `plan`, which is checked against both models.

    Raises:
        SettingError: a term does not fit the models.
    """
    activate(plan, examine(start.student), examine(teacher))
    return PreparedStudent(
        student=start.student, stages=(PlannedStage(plan=plan, trainable=trainable),), saved=start.saved
    )


def low_rank_start(
    teacher: PreTrainedModel,
    budget: Budget,
    solver: str,
    ranks: str,
    calibration: Batches | None,
    on_progress: OnProgress = nobody,
) -> Start:
    """What `factorize` makes; a copy of it, if the last call for this teacher was of the same, by the same batches."""
    made_of, written = (budget, solver, ranks), sum(parameter._version for parameter in teacher.parameters())
    kept = _LAST.get(teacher)
    if kept is not None and (kept.made_of, kept.teacher) == (made_of, written) and kept.calibration is calibration:
        return Start(copy.deepcopy(kept.student), kept.seconds)
    _LAST.pop(teacher, None)  # two would take room
    start = time.perf_counter()
    student = factorize(teacher, budget, solver=solver, ranks=ranks, calibration=calibration, on_progress=on_progress)
    seconds = time.perf_counter() - start
    if isinstance(calibration, list):  # anything else may be read only once, or change
        _LAST[teacher] = _LastStart(made_of, calibration, written, copy.deepcopy(student), seconds)
    return Start(student, 0.0)


def unmade_start(
    teacher: PreTrainedModel, budget: Budget, solver: str, ranks: str, calibration: Batches | None
) -> Start:
    """The teacher in the place of what `low_rank_start` would make of it: for whoever asks before there is a student.

    Raises:
        MakdError: no such student can be made, as far as it is known before any text is read.
    """
    settings = FactorizeConfig(solver=solver, ranks=ranks)
    check_factorizable(teacher, budget, settings, has_text=calibration is not None)
    return Start(teacher, 0.0)
