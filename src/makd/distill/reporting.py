"""Station 7: what is told while a Trainer works."""

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback

from makd.anatomy import Anatomy
from makd.aspects import ActivePlan
from makd.progress import OnProgress, Progress

logger = logging.getLogger(__name__)

NO_LOSSES = frozenset({"epoch", "learning_rate", "grad_norm", "num_input_tokens_seen", "student_share"})
"""What else stands in the Trainer's log lines."""
SPEEDS = frozenset({"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"})
"""How long an evaluation took, which is no finding."""


def report_off(plan: ActivePlan, *anatomies: Anatomy) -> None:
    """Tell of every aspect that is left out, and louder where that is because of how a model is built."""
    built_so = {aspect for anatomy in anatomies for aspect in anatomy.off}
    for aspect, reason in plan.off.items():
        level = logging.WARNING if aspect in built_so else logging.INFO
        logger.log(level, "aspect %s is off: %s", aspect, reason)


def report_frozen(student: nn.Module) -> None:
    """Tell how much of a student learns where not all of it does."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in student.parameters()]
    learning, total = sum(size for size, learns in sizes if learns), sum(size for size, _ in sizes)
    if learning < total:
        logger.info(
            "%s of the student's %s parameters learn; the others are frozen (requires_grad is False)",
            f"{learning:,}",
            f"{total:,}",
        )


class ReportSteps(TrainerCallback):
    """Tells of every step, with the losses of the last log line; and the log of what evaluations found.

    The Trainer knows all of it without asking an accelerator: losses are read where it logs them, and not before.
    """

    def __init__(self, progress: OnProgress, what: str = "distil") -> None:
        self.progress = progress
        self.what = what
        self._losses: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell that it begins; a run that goes on begins where it was."""
        self._report(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell how far it is; where a log line follows, that tells it."""
        if not control.should_log:
            self._report(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Keep the losses, to be told; write down what an evaluation found."""
        shown = {name: value for name, value in (logs or {}).items() if isinstance(value, float)}
        found = {name: value for name, value in shown.items() if name.startswith("eval_") and name not in SPEEDS}
        if found:
            line = "  ".join(f"{name} {value:.4g}" for name, value in found.items())
            logger.info("step %d/%d  %s", state.global_step, state.max_steps, line)
        if "loss" in shown:
            self._losses = {
                name: value for name, value in shown.items() if name not in NO_LOSSES and not name.startswith("train_")
            }
            self._report(state)

    def _report(self, state: Any) -> None:
        tokens = state.num_input_tokens_seen or None
        done, of = state.global_step, state.max_steps
        self.progress(Progress(self.what, done, of, "steps", tokens=tokens, losses=self._losses))
