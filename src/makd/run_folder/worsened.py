"""Station 9: tells of a training that has spoilt what it began with."""

import logging
from collections.abc import Mapping
from typing import Any

from makd.measures import worsened

logger = logging.getLogger(__name__)


def warn_worsened(metrics: Mapping[str, Any]) -> None:
    """Say so if all that was measured, as `metrics.json` has it, is worse after the training than before."""
    found = worsened(metrics)
    if found:
        logger.warning(
            "Training left the student worse than its start: %s. The start is not kept: take a smaller "
            "training.learning_rate or more steps, or training.steps 0 for the start alone.",
            "; ".join(found),
        )
