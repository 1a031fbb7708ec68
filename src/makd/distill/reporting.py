"""Station 7: what is told while a Trainer works."""

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

logger = logging.getLogger(__name__)


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
