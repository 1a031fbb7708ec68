"""Station 7: whether both models of a pair can stop short of their logits."""

import logging

from transformers import PreTrainedModel

from makd.anatomy import predictions_of
from makd.aspects import OF_HEAD, ActivePlan
from makd.capture import has_vocabulary_head, label_shift_of, why_not_repeated
from makd.errors import UnsupportedModelError

_logger = logging.getLogger(__name__)


def warn_whole_logits(student: PreTrainedModel, reason: str | None) -> None:
    """Warn for which `reason` of `shared_label_shift` a student makes all tokens' logits, if there is one."""
    if reason is not None:
        _logger.warning(
            "%s makes the logits of all tokens at each step, which takes more memory: %s. Smaller batches take less.",
            type(student).__name__,
            reason,
        )


def shared_label_shift(
    student: PreTrainedModel, teacher: PreTrainedModel, plan: ActivePlan
) -> tuple[int | None, str | None]:
    """Offset between a token and the label its prediction is scored against; None if full logits are needed.

    They have to where the head is none over a vocabulary, or where makd cannot repeat what a model does with what its
    head is handed.

    Returns:
        1 for causal models, 0 for masked ones; and the reason why makd needs full logits, if it does.

    Raises:
        UnsupportedModelError: the student's own loss is of other tokens than its class says.
    """
    if not (has_vocabulary_head(student) and has_vocabulary_head(teacher)):
        return None, None
    places = {active.place for active in plan.terms}
    if not places & {*OF_HEAD}:
        return 0, None
    reason = why_not_repeated(student)
    if reason is None and "predictions" in places:
        reason = why_not_repeated(teacher)
    label_shift: int | None = 0
    if "labels" in places:
        label_shift = label_shift_of(student)
        _check_label_shift(student, label_shift)
        if reason is None and label_shift is None:
            reason = "its own loss is more than the cross-entropy of its logits"
    return (label_shift, None) if reason is None else (None, reason)


def _check_label_shift(student: PreTrainedModel, label_shift: int | None) -> None:
    """Refuse a model whose loss looks at other labels than its class says: a step's shares would be counted by these.

    Raises:
        UnsupportedModelError: `label_shift` is not that of the predictions of the model's class.
    """
    predictions = predictions_of(student)
    if label_shift is None or predictions is None or predictions.label_shift == label_shift:
        return
    raise UnsupportedModelError(
        f"The loss of {type(student).__name__} looks at the label {label_shift} tokens further on, and makd takes its "
        f"predictions, by its class, for those of the token {predictions.label_shift} further on. Take "
        "'task' out of the plan, or load the model under another head (recipe.head)."
    )
