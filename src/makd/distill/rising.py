"""Station 7: when a training evaluates whose student's share of the completions follows the held-out loss.

The share rises after an evaluation whose loss is not below that of the one before. So there has to be one before, and
steps left to write in: else the student would learn from the data's completions to the end.
"""

import math
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from makd.aspects import ActivePlan
from makd.distill.losses.teacher_variances import TeacherVariances
from makd.errors import SettingError

OFTEN = 0.1
"""Share of the steps between evaluations, where nobody says it."""


def evaluates_first(plan: ActivePlan) -> bool:
    """Whether the loss before the first step compares with later ones: not where variances are yet to be measured."""
    return not TeacherVariances(plan).are_missing


def evaluate_for_share_(args: TrainingArguments, has_held_out: bool) -> None:
    """Let a training with an adaptive share evaluate, after each tenth of its steps unless it says when.

    Raises:
        SettingError: there are no held-out rows.
    """
    if not has_held_out:
        raise SettingError(
            "plan.completions.adaptive follows the loss on held-out rows, and there is no eval_dataset. Give one, or "
            "take adaptive false with a student_share."
        )
    if args.eval_strategy == IntervalStrategy.NO:
        args.eval_strategy, args.eval_steps = IntervalStrategy.STEPS, OFTEN


def check_rises(plan: ActivePlan, steps: int, every: float | None) -> None:
    """Refuse an adaptive share that could not rise before the end.

    Args:
        plan: fitted to the models.
        steps: optimizer steps of the training.
        every: steps between evaluations; None as `evaluate_for_share_` takes them.

    Raises:
        SettingError: there are too few evaluations before the last step.
    """
    if not plan.completions.adaptive:
        return
    every = math.ceil(OFTEN * steps) if every is None else every
    needed = 1 if evaluates_first(plan) else 2
    if (steps - 1) // every < needed:
        most = (steps - 1) // needed
        mend = f"Evaluate every {most} steps or more often (training.evaluate_every)" if most else "Train longer"
        raise SettingError(
            f"plan.completions.adaptive raises the student's share from one evaluation to the next, of which {needed} "
            f"or more have to come before the last of {steps} steps; with one every {every:g} steps the student would "
            f"never write. {mend}, or take adaptive false with a student_share."
        )


class CheckRises(TrainerCallback):
    """`check_rises` where a training begins: only then a Trainer knows its steps."""

    def __init__(self, plan: ActivePlan) -> None:
        self.plan = plan

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what could not rise."""
        by_epoch = args.eval_strategy == IntervalStrategy.EPOCH
        check_rises(
            self.plan, state.max_steps, state.max_steps / args.num_train_epochs if by_epoch else state.eval_steps
        )
