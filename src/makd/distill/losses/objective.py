"""Station 7: one teacher's forward and one student's, reduced to a loss for each aspect of a plan.

This is where tensors from `capture` meet the losses of `aspects`. It knows no trainer.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from makd.anatomy import Anatomy, Predictions
from makd.anatomy.tokens import IGNORE_INDEX, layer_tokens
from makd.aspects import (
    OF_HEAD,
    ActivePlan,
    ActiveTerm,
    Comparison,
    KeptPredictions,
    PooledTexts,
    PredictionLosses,
    SoftLoss,
    chunked_logits_loss,
    forward_kl,
    label_divergence,
    logits_divergence,
    next_labels,
    regression_mse,
    similarity_mse,
    vector_distance,
)
from makd.capture import HeadCall
from makd.distill.losses.counted import LossKey, predicting
from makd.distill.losses.shares import WHOLE, Shares
from makd.errors import DataError, NumericsError, SettingError

Inputs = Mapping[str, Tensor]


def aspect_losses(
    plan: ActivePlan,
    anatomy: Anatomy,
    inputs: Inputs,
    layers: Mapping[Comparison, Float[Tensor, ""]],
    teacher_output: Any,
    student_output: Any,
) -> dict[str, Float[Tensor, ""]]:
    """Loss of every aspect of `plan` on one batch, unweighted, each a mean over its layers, roles and real tokens.

    Arguments are those of `mean_losses`.
    """
    return by_term(plan, mean_losses(plan, anatomy, inputs, layers, teacher_output, student_output))


def mean_losses(
    plan: ActivePlan,
    anatomy: Anatomy,
    inputs: Inputs,
    layers: Mapping[Comparison, Float[Tensor, ""]],
    teacher_output: Any,
    student_output: Any,
    with_predictions: bool = True,
) -> dict[LossKey, Float[Tensor, ""]]:
    """Every mean that the aspects of `plan` are made of, on one batch, unweighted: `loss_keys`.

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
    losses: dict[LossKey, Tensor] = {comparison: layers[comparison] for comparison in plan.comparisons}
    check_labels(inputs, anatomy.predictions)
    for active in plan.terms:
        if active.comparisons or (active.place in OF_HEAD and not with_predictions):
            continue
        if active.place == "labels":
            if student_output.get("loss") is not None:
                losses[active.name] = task_loss(inputs, student_output, anatomy.predictions)
        elif active.place == "predictions":
            losses[active.name] = _logits(active, anatomy, inputs, teacher_output, student_output)
        else:
            losses[active.name] = _embedding(active, anatomy, inputs, teacher_output, student_output[0])
    return losses


def by_term(
    plan: ActivePlan, losses: Mapping[LossKey, Float[Tensor, ""]], shares: Shares = WHOLE
) -> dict[str, Float[Tensor, ""]]:
    """What each term's loss is: the mean of its comparisons, each of which counts for its share of the step."""
    found: dict[str, Tensor] = {}
    for active in plan.terms:
        if active.comparisons:
            parts = [losses[comparison] * shares[comparison] for comparison in active.comparisons]
            found[active.name] = torch.stack(parts).mean()
        elif active.name in losses:
            found[active.name] = losses[active.name] * shares[active.name]
    return found


def task_loss(inputs: Inputs, output: Any, predictions: Predictions | None = None) -> Float[Tensor, ""]:
    """The model's own loss, over those rows that have a label: 0 where none of the batch has one.

    Rows have none where their label is -100, that of a regression or of several labels NaN, or an answer's start
    beyond the row's end.

    Args:
        inputs: the batch.
        output: the model's ModelOutput.
        predictions: what the model predicts; None for a model whose predictions are not known.
    """
    loss: Tensor = output.loss
    labels, starts = inputs.get("labels"), inputs.get("start_positions")
    if labels is not None and labels.is_floating_point():
        real = ~labels.isnan()
        if bool(real.all()):
            return loss
        found, wanted = output.logits.reshape(labels.shape)[real], labels[real]
        if not bool(real.any()):
            return _zero(output)
        if predictions is not None and predictions.target == "labels":
            return torch.nn.functional.binary_cross_entropy_with_logits(found, wanted)
        squares: Tensor = (found - wanted).square()
        return squares.mean()
    if bool(torch.isnan(loss)):  # a mean over no rows: with some, the model's own cross-entropy left the others out
        absent = None
        if labels is not None:
            absent = labels == IGNORE_INDEX
        elif starts is not None:
            absent = starts >= inputs["input_ids"].shape[1]
        if absent is not None and bool(absent.all()):
            return _zero(output)
    return loss


def check_labels(inputs: Inputs, predictions: Predictions | None) -> None:
    """Refuse labels of another kind than the predictions: transformers would choose its loss by them, and go on.

    Raises:
        SettingError: several labels a row for a model whose config does not say that it has several, or one a row for
            one that does.
    """
    labels = inputs.get("labels")
    if labels is None or predictions is None or predictions.each != "row" or not predictions.size:
        return
    several = labels.is_floating_point() and labels.dim() == 2 and labels.shape[1] > 1
    if predictions.target == "classes" and labels.is_floating_point() and several:
        raise SettingError(
            f"The labels have the shape {tuple(labels.shape)} of several labels a row, but the model's config says one "
            "class a row. Set problem_type to multi_label_classification (or regression) in the config of both models."
        )
    if predictions.target == "labels" and not labels.is_floating_point():
        raise SettingError(
            f"The labels have the dtype {labels.dtype} of classes, but the model's problem_type is "
            "multi_label_classification, whose labels are 0.0 or 1.0 for each label of a row."
        )


def _zero(output: Any) -> Tensor:
    """0, with a gradient of 0 for what was predicted."""
    zero: Tensor = output[1].sum() * 0.0
    return zero


def prediction_losses(
    plan: ActivePlan,
    anatomy: Anatomy,
    inputs: Inputs,
    teacher: HeadCall | KeptPredictions | None,
    student: HeadCall,
    label_shift: int,
    shares: Shares = WHOLE,
) -> tuple[Float[Tensor, ""] | None, dict[str, Float[Tensor, ""]]]:
    """`logits` and `task` of a vocabulary, from what the heads were handed, without the logits.

    Args:
        plan: aspects.
        anatomy: of the student.
        inputs: the batch, with labels if it has some.
        teacher: the call of the teacher's head, or what was kept of its predictions; not looked at where the plan has
            no `logits`.
        student: the call of the student's head.
        label_shift: 1 where a token's prediction is of the next one's label, 0 where of its own.
        shares: of the step, by which they are weighed in the sum.

    Returns:
        Their weighted sum, which carries the gradient (None if the plan has neither, or no labels for `task`), and each
        alone, unweighted and without gradient.

    Raises:
        DataError: the labels are not one a predicted token.
    """
    soft = [active for active in plan.terms if active.place == "predictions"]
    hard = [active for active in plan.terms if active.place == "labels" and inputs.get("labels") is not None]
    if not soft and not hard:
        return None, {}
    assert student.inputs is not None
    labels = inputs["labels"] if hard else None
    if labels is not None and labels.shape != student.inputs.shape[:-1]:
        raise DataError(
            f"The labels have shape {tuple(labels.shape)}, but the model predicts one token each of "
            f"{tuple(student.inputs.shape[:-1])}. Give one label a token, or none."
        )
    kept, call = (teacher, None) if isinstance(teacher, KeptPredictions) else (None, teacher)
    found: PredictionLosses = chunked_logits_loss(
        student.inputs,
        student.head,
        None if call is None else call.inputs,
        None if call is None else call.head,
        predicting(soft[0].term, anatomy, inputs) if soft else None,
        [_soft_loss(active, kept is not None, shares) for active in soft],
        next_labels(labels) if labels is not None and label_shift else labels,
        sum((active.term.weight * shares[active.name] for active in hard), start=0.0),
        kept,
    )
    alone = {active.name: loss for active, loss in zip(soft, found.soft, strict=True)}
    if found.hard is not None:
        alone |= {active.name: found.hard for active in hard}
    return found.total, alone


def _soft_loss(active: ActiveTerm, kept: bool, shares: Shares) -> SoftLoss:
    term = active.term
    settings: dict[str, Any] = {"temperature": term.temperature, "weight": term.weight * shares[active.name]}
    if kept and term.divergence == "top_k":  # the rest is joined already
        return SoftLoss(divergence=forward_kl, k=term.k, **settings)
    return SoftLoss(divergence=term.compare(), **settings)


def weighted_sum(
    plan: ActivePlan, losses: Mapping[str, Float[Tensor, ""]], predicted: Float[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """What is minimised: the losses times their terms' weights.

    Args:
        plan: aspects.
        losses: by the names of the plan's terms.
        predicted: the weighted sum of what is behind the head, where `prediction_losses` made it; theirs in `losses`
            are not added.

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
            if active.name in losses and (predicted is None or active.place not in OF_HEAD)
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
    predictions = anatomy.predictions
    assert predictions is not None  # `activate` has no logits term without
    tokens = predicting(active.term, anatomy, inputs)
    term, mask = active.term, tokens if predictions.each == "token" else None
    losses = []
    for student, teacher in zip(predictions.read(ours), predictions.read(theirs), strict=True):
        if predictions.target == "numbers":
            losses.append(regression_mse(student, teacher, mask))
        elif predictions.target == "labels":
            losses.append(label_divergence(student, teacher, mask, term.temperature, term.compare()))
        elif predictions.target == "places":  # a distribution over the tokens of a row
            lowest = torch.finfo(torch.float32).min
            student, teacher = (torch.where(tokens, side.float(), lowest) for side in (student, teacher))
            losses.append(logits_divergence(student, teacher, None, term.temperature, term.compare()))
        else:
            losses.append(logits_divergence(student, teacher, mask, term.temperature, term.compare()))
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def _embedding(active: ActiveTerm, anatomy: Anatomy, inputs: Inputs, theirs: Any, ours: Tensor) -> Float[Tensor, ""]:
    assert active.encoder is not None
    mask, encoder = layer_tokens(anatomy, anatomy.layers[-1], inputs), active.encoder
    kept = isinstance(theirs, PooledTexts)
    vectors = encoder.after(theirs.by_pooling[encoder.pooling]) if kept else encoder(theirs[0], mask)
    compare = vector_distance if active.term.aspect == "embedding" else similarity_mse
    return compare(encoder(ours, mask), vectors)
