"""Station 10: one method on one setup: a student within the budget, taught as all others are, and measured."""

import math
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel, PrinterCallback, set_seed

from makd.anatomy.limits import token_limit
from makd.aspects import Plan
from makd.baselines import Baseline, PreparedStudent
from makd.baselines.starts import low_rank_start
from makd.cache import TeacherCache
from makd.comparison.rows import Rows
from makd.comparison.setup import Setup
from makd.data import collator, row_lengths, token_batches
from makd.distill import DistillTrainer, ReportSteps, TrainingConfig, float32_weights, learning, train, training_lengths
from makd.generation import stop_tokens
from makd.progress import OnProgress, reporting
from makd.ranks.budget import Budget


@dataclass(frozen=True)
class TrainedStudent:
    """A student, and what teaching it took."""

    student: PreTrainedModel
    scores: dict[str, float]
    steps: int
    tokens: int
    """Real tokens that were read in training."""
    seconds: dict[str, float]
    """`prepare`, `cache`, `train`, `evaluate`; the first two as if no other cell had made them."""


def teach(
    setup: Setup,
    method: Baseline,
    budget: Budget,
    training: TrainingConfig,
    seed: int,
    progress: OnProgress,
) -> TrainedStudent:
    """Make a student and teach it on the training rows of `setup`.

    Args:
        setup: teacher and rows.
        method: with its hyper-parameters.
        budget: what the student may have.
        training: steps, batches and schedule; its learning rate is the method's.
        seed: of everything random.
        progress: called with a `Progress` for each part of the work, and after every step.
    """
    task, seconds = setup.task, dict.fromkeys(("prepare", "cache", "train", "evaluate"), 0.0)
    set_seed(seed)
    start = time.perf_counter()
    made = prepare_student(setup, method, budget, seed, progress)
    set_seed(seed)  # a start that is there already draws nothing
    seconds["prepare"] = time.perf_counter() - start + made.saved
    total, tokens = count_steps(task, training), 0
    caching: dict[TeacherCache | None, float] = {}  # stages may learn from one
    with float32_weights(made.student):
        for number, (plan, settings) in enumerate(trainings_of(made, method, training, total)):
            cache = None
            if setup.caches is not None:
                cache, spent = setup.caches.of(plan, made.student)
                caching[cache] = spent
            lengths = training_lengths(task.distillation, plan.writers, token_limit(setup.teacher))
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder, learning(made.student, settings, seed, number + 1):
                trainer = DistillTrainer(
                    made.student,
                    setup.teacher,
                    plan,
                    settings.student_dropout,
                    tokens_per_batch=settings.find_tokens(lengths),
                    teacher_dtype=settings.find_teacher_dtype(),
                    cache=cache,
                    stops=stop_tokens(setup.teacher, task.tokenizer) if plan.writers.written else (),
                    args=settings.to_arguments(Path(folder), seed + 1000 * number, setup.teacher.device.type == "cpu"),
                    train_dataset=task.distillation,
                    data_collator=collator(task.tokenizer, setup.teacher),
                    callbacks=[ReportSteps(progress)],
                )
                trainer.remove_callback(PrinterCallback)  # prints log lines as dicts; ours go through logging
                tokens += train(trainer, Path(folder), False)
            seconds["train"] += time.perf_counter() - start
            made.student.eval()
    seconds["cache"] = sum(caching.values())
    start = time.perf_counter()
    with reporting("evaluate", progress):
        scores = setup.measure(made.student)
    seconds["evaluate"] = time.perf_counter() - start
    return TrainedStudent(made.student, scores, total, tokens, seconds)


def prepare_student(setup: Setup, method: Baseline, budget: Budget, seed: int, progress: OnProgress) -> PreparedStudent:
    """A method's student before its training; what a factorization does is told while it goes on."""
    with reporting("prepare", progress):
        begin = partial(low_rank_start, on_progress=progress)
        return method.prepare(setup.teacher, budget, setup.calibration, seed, begin)


def trainings_of(
    made: PreparedStudent, method: Baseline, training: TrainingConfig, steps: int
) -> list[tuple[Plan, TrainingConfig]]:
    """The trainings that a student goes through, one after the other: by which plan, and how; none without steps.

    Raises:
        SettingError: there are more of them than steps.
    """
    found = []
    for stage, own in zip(made.stages, made.steps(steps), strict=True):
        settings = replace(training, steps=own, learning_rate=method.learning_rate)
        if stage.trainable is not None:
            settings = replace(settings, trainable=stage.trainable)
        if own:  # all have some, or none has any
            found.append((stage.plan, settings))
    return found


def count_steps(task: Rows, training: TrainingConfig) -> int:
    """Optimizer steps of a cell: `training.steps`, or those of its epochs."""
    if training.steps is not None:
        return training.steps
    lengths = row_lengths(task.distillation)
    batches = len(token_batches(lengths, training.find_tokens(lengths)))
    return max(1, math.ceil(training.epochs * batches / training.accumulate))
