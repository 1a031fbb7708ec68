"""Station 6: one teacher's forward and one student's, reduced to a loss for each aspect of a plan.

This is where tensors from `capture` meet the losses of `aspects`. It knows no trainer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from makd.anatomy import Anatomy
from makd.anatomy.tokens import layer_tokens
from makd.aspects import (
    ActivePlan,
    ActiveTerm,
    Comparison,
    PredictionLosses,
    SoftLoss,
    chunked_logits_loss,
    embedding_distance,
    logits_divergence,
    next_labels,
    pool,
    regression_mse,
    similarity_mse,
)
from makd.capture import HeadCall
from makd.errors import DataError, NumericsError

Inputs = Mapping[str, Tensor]
PREDICTED = ("logits", "task")
"""Aspects of what a model's head makes."""


def aspect_losses(
    plan: ActivePlan,
    anatomy: Anatomy,
    inputs: Inputs,
    layers: Mapping[Comparison, Float[Tensor, ""]],
    teacher_output: Any,
    student_output: Any,
    with_predictions: bool = True,
) -> dict[str, Float[Tensor, ""]]:
    """Loss of every aspect of `plan` on one batch, unweighted, each a mean over its layers, roles and real tokens.

    Args:
        plan: aspects.
        anatomy: of the student; the teacher's has the same layers and roles.
        inputs: the batch that both models read.
        layers: the loss of every comparison of the plan, as `LayerLosses` makes them.
        teacher_output: the teacher's ModelOutput.
        student_output: the student's ModelOutput.
        with_predictions: whether `logits` and `task` are among the losses. False where the models withheld their
            logits: see `prediction_losses`.
    """
    losses: dict[str, Tensor] = {}
    for active in plan.terms:
        aspect = active.term.aspect
        if aspect in PREDICTED and not with_predictions:
            continue
        if aspect == "task":
            if student_output.get("loss") is not None:
                losses[active.name] = student_output.loss
        elif aspect == "logits":
            losses[active.name] = _logits(active, anatomy, inputs, teacher_output, student_output)
        elif aspect in ("embedding", "similarity"):
            losses[active.name] = _embedding(active, anatomy, inputs, teacher_output[0], student_output[0])
        else:
            losses[active.name] = torch.stack([layers[comparison] for comparison in active.comparisons]).mean()
    return losses


def prediction_losses(
    plan: ActivePlan, anatomy: Anatomy, inputs: Inputs, teacher: HeadCall | None, student: HeadCall, shift: int
) -> tuple[Float[Tensor, ""] | None, dict[str, Float[Tensor, ""]]]:
    """`logits` and `task` of a vocabulary, from what the heads were handed, without the logits.

    Args:
        plan: aspects.
        anatomy: of the student.
        inputs: the batch, with labels if it has some.
        teacher: the call of the teacher's head; not looked at where the plan has no `logits`.
        student: the call of the student's head.
        shift: 1 where a token's prediction is of the next one's label, 0 where of its own.

    Returns:
        Their weighted sum, which carries the gradient (None if the plan has neither, or no labels for `task`), and each
        alone, unweighted and without gradient.

    Raises:
        DataError: the labels are not one a predicted token.
    """
    soft = [active for active in plan.terms if active.term.aspect == "logits"]
    hard = [active for active in plan.terms if active.term.aspect == "task" and inputs.get("labels") is not None]
    if not soft and not hard:
        return None, {}
    assert student.inputs is not None
    labels = inputs["labels"] if hard else None
    if labels is not None and labels.shape != student.inputs.shape[:-1]:
        raise DataError(
            f"The labels have shape {tuple(labels.shape)}, but the model predicts one token each of "
            f"{tuple(student.inputs.shape[:-1])}. Give one label a token, or none."
        )
    found: PredictionLosses = chunked_logits_loss(
        student.inputs,
        student.head,
        None if teacher is None else teacher.inputs,
        None if teacher is None else teacher.head,
        layer_tokens(anatomy, anatomy.layers[-1], inputs) if soft else None,
        [
            SoftLoss(divergence=term.compare(), temperature=term.temperature, weight=term.weight)
            for term in (active.term for active in soft)
        ],
        next_labels(labels) if labels is not None and shift else labels,
        sum((active.term.weight for active in hard), start=0.0),
    )
    alone = {active.name: loss for active, loss in zip(soft, found.soft, strict=True)}
    if found.hard is not None:
        alone |= {active.name: found.hard for active in hard}
    return found.total, alone


def weighted_sum(
    plan: ActivePlan, losses: Mapping[str, Float[Tensor, ""]], predicted: Float[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """What is minimised: the losses times their terms' weights.

    Args:
        plan: aspects.
        losses: by the names of the plan's terms.
        predicted: the weighted sum of `PREDICTED`, where `prediction_losses` made it; theirs in `losses` are not added.

    Raises:
        NumericsError: an aspect's loss is NaN or infinite, which training would never recover from.
        DataError: there is no loss: the plan is the task alone, and the batch has no labels.
    """
    if not losses and predicted is None:
        raise DataError("The plan learns the task alone, and a batch has no labels. Give labels, or add an aspect.")
    total = sum(
        (
            active.term.weight * losses[active.name]
            for active in plan.terms
            if active.name in losses and (predicted is None or active.term.aspect not in PREDICTED)
        ),
        start=torch.zeros((), device=next(iter(losses.values())).device) if predicted is None else predicted,
    )
    if not bool(torch.isfinite(total)):
        wrong = [name for name, loss in losses.items() if not bool(torch.isfinite(loss))]
        raise NumericsError(
            f"The loss of {', '.join(wrong) or 'the sum'} is not finite. Check the teacher for NaN or overflow "
            "(float16 teachers overflow often; bfloat16 does not), and lower the learning rate."
        )
    return total


def _logits(active: ActiveTerm, anatomy: Anatomy, inputs: Inputs, theirs: Any, ours: Any) -> Float[Tensor, ""]:
    tokens = layer_tokens(anatomy, anatomy.layers[-1], inputs)
    if "start_logits" in ours:  # question answering: two distributions over the tokens of a row
        lowest = torch.finfo(torch.float32).min
        parts = [
            logits_divergence(
                torch.where(tokens, ours[name].float(), lowest),
                torch.where(tokens, theirs[name].float(), lowest),
                None,
                active.term.temperature,
                active.term.compare(),
            )
            for name in ("start_logits", "end_logits")
        ]
        return torch.stack(parts).mean()
    if ours.logits.shape[-1] == 1:
        return regression_mse(ours.logits, theirs.logits)
    mask = tokens if ours.logits.dim() == 3 else None  # one prediction a token, or one a row
    return logits_divergence(ours.logits, theirs.logits, mask, active.term.temperature, active.term.compare())


def _embedding(active: ActiveTerm, anatomy: Anatomy, inputs: Inputs, theirs: Tensor, ours: Tensor) -> Float[Tensor, ""]:
    mask, pooling = layer_tokens(anatomy, anatomy.layers[-1], inputs), active.term.pooling
    if active.term.aspect == "embedding":
        return embedding_distance(ours, theirs, mask, pooling)
    return similarity_mse(pool(ours, mask, pooling), pool(theirs, mask, pooling))
