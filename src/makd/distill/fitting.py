"""Station 7: whether models and rows allow what a plan asks for, before any work that a refusal would make useless.

Runs and comparisons ask with the teacher in the student's place, before they have a student; the trainer asks with the
pair itself. So nothing that follows from plan, teacher and rows is refused after hours of a factorization.
"""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from makd.anatomy import Anatomy
from makd.anatomy.limits import token_limit
from makd.aspects import ActivePlan, Completions, Plan, activate
from makd.capture import examine, has_vocabulary_head
from makd.capture.attention import check_float32
from makd.data import has_completions, reads_blocks, token_batches
from makd.distill.engines.support import check_engine
from makd.distill.lengths import training_lengths
from makd.distill.losses.projections import find_widths
from makd.distill.losses.withholding import shared_label_shift
from makd.distill.rising import check_rises
from makd.distill.trainable import check_adapters
from makd.distill.training import TrainingConfig
from makd.errors import DataError, SettingError
from makd.processes.started import process_count


@dataclass(frozen=True)
class TrainingRows:
    """What is learned from, and in which batches."""

    rows: Any
    """To train on; a stream has no length."""
    batch_size: int
    """Rows of a batch, where `tokens_per_batch` does not say them."""
    tokens_per_batch: int | None = None
    """Of a training batch, as `DistillTrainer` takes it."""
    cached: bool = False
    """Whether a cache answers for the teacher."""

    @staticmethod
    def of(
        rows: Dataset, training: TrainingConfig, completions: Completions, limit: int | None, *, cached: bool
    ) -> "TrainingRows":
        """Of a run.

        Args:
            rows: to train on.
            training: says how many share a batch.
            completions: who writes them.
            limit: tokens that a row of the models may have.
            cached: whether a cache answers for the teacher.
        """
        tokens = training.find_tokens(training_lengths(rows, completions, limit))
        return TrainingRows(rows, training.batch_size, tokens, cached=cached)

    def find_widest(self, completions: Completions, student: PreTrainedModel) -> int:
        """Rows of the batch that has the most."""
        if self.tokens_per_batch is None:
            return self.batch_size
        return max(self._sizes(completions, student, self.tokens_per_batch), default=0)

    def count_batches(self, completions: Completions, student: PreTrainedModel) -> int:
        """Batches of an epoch, in each process."""
        if self.tokens_per_batch is None:
            return -(-len(self.rows) // (self.batch_size * process_count()))
        return -(-len(self._sizes(completions, student, self.tokens_per_batch)) // process_count())

    def _sizes(self, completions: Completions, student: PreTrainedModel, tokens: int) -> list[int]:
        return [*map(len, token_batches(training_lengths(self.rows, completions, token_limit(student)), tokens))]


def check_stage(
    plan: Plan,
    training: TrainingConfig,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: Dataset,
    *,
    cached: bool,
) -> None:
    """Refuse a training that these models cannot go through on these rows: all that is known before it is begun.

    Args:
        plan: what is to be mimicked.
        training: how, for at least one step.
        student: who learns; the teacher itself, where a student of it has yet to be factorized.
        teacher: who is mimicked.
        rows: to train on.
        cached: whether a cache answers for the teacher.

    Raises:
        SettingError: a term does not fit the models; or as `check_adapters`, `check_engine`, `check_rises` and
            `check_training` raise it.
        DataError, UnsupportedModelError: as `check_training`; or the student cannot be run in float32.
    """
    check_float32(student)
    check_adapters(training, None if student is teacher else student)
    check_engine(student, training, plan.writers)
    anatomy, teacher_anatomy = examine(student), examine(teacher)
    active = activate(plan, anatomy, teacher_anatomy)
    given = TrainingRows.of(rows, training, active.completions, token_limit(student), cached=cached)
    if active.completions.adaptive:
        steps = training.find_steps(given.count_batches(active.completions, student))
        check_rises(active, steps, training.evaluate_every)
    check_training(active, student, teacher, anatomy, teacher_anatomy, given)


def check_training(
    plan: ActivePlan,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    teacher_anatomy: Anatomy,
    given: TrainingRows,
) -> tuple[int | None, str | None]:
    """Refuse a plan that these models cannot learn by from these rows.

    Args:
        plan: fitted to the models.
        student: who learns; the teacher, where there is no student yet.
        teacher: who is mimicked.
        anatomy: of the student.
        teacher_anatomy: of the teacher.
        given: the rows.

    Returns:
        What `shared_label_shift` finds, which is tried on the models.

    Raises:
        SettingError: the sizes of the models do not allow an aspect; every batch is of one text, and texts are compared
            with each other; completions are to be written by models that write none, or to be kept in fewer than a
            batch has; or a cache lacks what is asked of the teacher.
        DataError: completions are to be written, and the rows do not say where prompts end.
        UnsupportedModelError: the student's own loss is of other tokens than its class says.
    """
    find_widths(plan, student, teacher, anatomy, teacher_anatomy)
    _check_texts(plan, student, given)
    if plan.completions.written:
        _check_writers(student, given)
        _check_replay(plan, student, given)
    found = shared_label_shift(student, teacher, plan)
    _check_cached(plan, student, teacher, given, found[0])
    return found


def _check_texts(plan: ActivePlan, student: PreTrainedModel, given: TrainingRows) -> None:
    """Refuse `similarity`, which compares the texts of a batch, where each batch is of one text: it would be 0."""
    if given.rows is None or all(active.term.aspect != "similarity" for active in plan.terms):
        return
    if given.find_widest(plan.completions, student) != 1:
        return
    why = "per_device_train_batch_size" if given.tokens_per_batch is None else "tokens_per_batch"
    raise SettingError(
        "similarity compares the texts of a batch with each other, and every batch has one text: the term would be "
        f"0 whatever the student does. Give a larger {why}, or take similarity out of the plan."
    )


def _check_writers(student: PreTrainedModel, given: TrainingRows) -> None:
    """Refuse models that write nothing, rows that do not say where prompts end, and a cache of old texts."""
    if not reads_blocks(student) or not student.can_generate():
        raise SettingError(
            "The plan has completions written in the place of the data's, after their prompts, which is done by causal "
            f"language models alone; {type(student).__name__} is none. Take a plan of the data's own text, such as "
            "preset kd."
        )
    if getattr(given.rows, "column_names", None) and not has_completions(given.rows):  # a stream may not know its own
        raise DataError(
            "The plan has completions written, and the rows have no labels: they are plain text, which has no prompts. "
            "Give data of prompts with responses, or messages; or take a plan of the data's own text."
        )
    if given.cached:
        raise SettingError(
            "The plan has completions written while the student learns, and a teacher cache knows the data's alone. "
            "Train without the cache, or take a plan of the data's own text."
        )


def _check_replay(plan: ActivePlan, student: PreTrainedModel, given: TrainingRows) -> None:
    """Refuse batches of more rows than are kept, so that the student would write anew at every step."""
    settings = plan.completions
    if settings.replay == 0 or not settings.by_student:
        return
    widest = given.find_widest(settings, student)
    if settings.replay < widest:
        raise SettingError(
            f"plan.completions.replay keeps {settings.replay} completions, and a batch has up to {widest} rows: it "
            f"could never be drawn from them. Keep at least {widest}, or 0 to learn from each once."
        )


def _check_cached(
    plan: ActivePlan, student: PreTrainedModel, teacher: PreTrainedModel, given: TrainingRows, label_shift: int | None
) -> None:
    """Refuse a cache where the student has to make its own logits."""
    asks_cache = given.cached and any(active.place == "predictions" for active in plan.terms)
    if asks_cache and has_vocabulary_head(teacher) and label_shift is None:
        raise SettingError(
            f"{type(student).__name__} has to make its logits itself with this plan, and a cache holds no whole "
            "logits over a vocabulary. Take 'task' or 'logits' out of the plan, or train without a cache."
        )
