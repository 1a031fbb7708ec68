"""Station 10: outputs of the teacher of some cells on their rows, made once, and gone when those cells are done."""

import logging
import tempfile
import time
from pathlib import Path

from transformers import PreTrainedModel

from makd.aspects import ActivePlan, Plan, activate
from makd.cache import CacheConfig, TeacherCache, needs, write_cache
from makd.capture import examine
from makd.comparison.rows import Rows
from makd.data import collator
from makd.progress import OnProgress

logger = logging.getLogger(__name__)


def kept_for(plan: Plan, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[ActivePlan, frozenset[str]]:
    """`plan` fitted to the models, and what of the teacher a cache has to keep for it: nothing where none is used.

    Raises:
        SettingError: something that the plan compares with cannot be kept.
    """
    active = activate(plan, examine(student), examine(teacher))
    asked = [] if plan.writers.written else needs(active, teacher)
    return active, frozenset(need.part for need in asked)


class TeacherCaches:
    """Caches of one teacher on the training rows of one task, made when a plan asks for what none of them has.

    They are in a folder of their own in the system's place for temporary files (`TMPDIR`).
    """

    def __init__(self, teacher: PreTrainedModel, task: Rows, settings: CacheConfig, progress: OnProgress) -> None:
        self.teacher, self.task, self.settings, self.progress = teacher, task, settings, progress
        self._folder = tempfile.TemporaryDirectory(prefix="makd-cells-", ignore_cleanup_errors=True)
        self._made: list[tuple[frozenset[str], TeacherCache, float]] = []

    def of(self, plan: Plan, student: PreTrainedModel) -> tuple[TeacherCache | None, float]:
        """A cache with all that `plan` compares with, and the seconds that its making took, now or earlier.

        None, and no seconds, for a plan that compares nothing; and for one that learns from completions that are
        written meanwhile, of which the teacher has to be asked then.

        Args:
            plan: what `student` is to mimic.
            student: any with layers that stand for the teacher's.

        Raises:
            SettingError: something that the plan compares with cannot be kept.
        """
        active, needed = kept_for(plan, student, self.teacher)
        if not needed:
            return None, 0.0
        for parts, cache, seconds in self._made:
            if needed <= parts:
                return cache, seconds
        start, rows = time.perf_counter(), self.task.distillation
        folder, collate = Path(self._folder.name) / str(len(self._made)), collator(self.task.tokenizer, self.teacher)
        # without an identity: nobody opens it but this object
        content = write_cache(self.teacher, rows, collate, active, folder, {}, self.settings, self.progress)
        seconds = time.perf_counter() - start
        self._made.append((needed, TeacherCache(folder, content), seconds))
        logger.info("teacher cache of %.0f MB in %.0f s", content["bytes"] / 1e6, seconds)
        return self._made[-1][1], seconds

    def close(self) -> None:
        """Remove them from disk."""
        self._made.clear()
        self._folder.cleanup()
