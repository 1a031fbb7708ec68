"""Station 7: whether both models of a pair can stop short of their logits."""

import logging

from transformers import PreTrainedModel

from makd.anatomy import predictions_of
from makd.aspects import ActivePlan
from makd.capture import has_vocabulary_head, own_shift, why_not_repeated
from makd.errors import UnsupportedModelError

_logger = logging.getLogger(__name__)


def warn_whole_logits(student: PreTrainedModel, reason: str | None) -> None:
    """Log for which `reason` of `find_shift` a student makes the logits of all tokens, if there is one."""
    if reason is not None:
        _logger.warning(
            "%s makes the logits of all tokens at each step, which takes more memory: %s. Smaller batches take less.",
            type(student).__name__,
            reason,
        )


def find_shift(student: PreTrainedModel, teacher: PreTrainedModel, plan: ActivePlan) -> tuple[int | None, str | None]:
    """How many tokens on the label is that a prediction is of; None where the models have to make their logits.

    They have to where the head is none over a vocabulary, or where makd cannot repeat what a model does with what its
    head is handed.

    Returns:
        The shift; and the reason why makd cannot, if it cannot.

    Raises:
        UnsupportedModelError: the student's own loss is of other tokens than its class says.
    """
    if not (has_vocabulary_head(student) and has_vocabulary_head(teacher)):
        return None, None
    aspects = {active.term.aspect for active in plan.terms}
    if not aspects & {"logits", "task"}:
        return 0, None
    reason = why_not_repeated(student)
    if reason is None and "logits" in aspects:
        reason = why_not_repeated(teacher)
    shift: int | None = 0
    if "task" in aspects:
        shift = own_shift(student)
        _check_shift(student, shift)
        if reason is None and shift is None:
            reason = "its own loss is more than the cross-entropy of its logits"
    return (shift, None) if reason is None else (None, reason)


def _check_shift(student: PreTrainedModel, shift: int | None) -> None:
    """Refuse a model whose loss looks at other labels than its class says: a step's shares would be counted by these.

    Raises:
        UnsupportedModelError: it is so.
    """
    predictions = predictions_of(student)
    if shift is None or predictions is None or predictions.ahead == shift:
        return
    raise UnsupportedModelError(
        f"The loss of {type(student).__name__} looks at the label {shift} tokens further on, and makd takes its "
        f"predictions, by its class, for those of the token {predictions.ahead} further on. Take 'task' out of the "
        "plan, or load the model under another head (recipe.head)."
    )
