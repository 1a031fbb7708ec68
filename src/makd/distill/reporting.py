"""Station 7: what is told while a Trainer works."""

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from makd.anatomy import Anatomy
from makd.aspects import ActivePlan

logger = logging.getLogger(__name__)


def report_off(plan: ActivePlan, *anatomies: Anatomy) -> None:
    """Tell of every aspect that is left out, and louder where that is because of how a model is built."""
    built_so = {aspect for anatomy in anatomies for aspect in anatomy.off}
    for aspect, reason in plan.off.items():
        level = logging.WARNING if aspect in built_so else logging.INFO
        logger.log(level, "aspect %s is off: %s", aspect, reason)


class ReportSteps(TrainerCallback):
    """Tells the progress bar of every step, and the log of every log line."""

    def __init__(self, progress: Callable[[str, int, int], None], what: str = "distil") -> None:
        self.progress = progress
        self.what = what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.progress(self.what, state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Write the losses."""
        shown = {name: value for name, value in (logs or {}).items() if isinstance(value, float) and name != "epoch"}
        line = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        logger.info("step %d/%d  %s", state.global_step, state.max_steps, line)
