"""Station 7: whether both models of a pair can stop short of their logits."""

import logging

from transformers import PreTrainedModel

from makd.aspects import ActivePlan
from makd.capture import has_vocabulary_head, read_predictions

_logger = logging.getLogger(__name__)


def withheld_shift(student: PreTrainedModel, teacher: PreTrainedModel, plan: ActivePlan) -> int | None:
    """How many tokens on the label is that a prediction is of; None where the models have to make their logits.

    They have to where the head is none over a vocabulary, or where makd cannot repeat what a model does with what its
    head is handed, which the log says.
    """
    if not (has_vocabulary_head(student) and has_vocabulary_head(teacher)):
        return None
    aspects = {active.term.aspect for active in plan.terms}
    if not aspects & {"logits", "task"}:
        return 0
    ours = read_predictions(student)
    reason = ours.reason
    if reason is None and "logits" in aspects:
        reason = read_predictions(teacher).reason
    if reason is None and "task" in aspects and ours.shift is None:
        reason = "its own loss is more than the cross-entropy of its logits"
    if reason is not None:
        _logger.warning(
            "%s makes the logits of all tokens at each step, which takes more memory: %s. Smaller batches take less.",
            type(student).__name__,
            reason,
        )
        return None
    return ours.shift or 0
