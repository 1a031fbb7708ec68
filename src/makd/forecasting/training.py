"""Before the flow: what a student's training will take: steps, tokens, memory, and counted operations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from makd.aspects import PRESETS
from makd.config import Stage
from makd.data import token_batches
from makd.forecasting import operations
from makd.forecasting.memory import AUTOGRAD_COPIES, Memory
from makd.forecasting.operations import Operations, TextShape, total
from makd.forecasting.shapes import ModelShape

LEARNING_BYTES = 16
"""Of a parameter that learns: itself, its gradient and AdamW's two moments, in float32."""
LOSS_PASSES = 3.0
"""Passes through what a layer's linears read and write that comparing it with the teacher's takes, there and back."""
LOSS_OF_LOGITS = 0.5
"""What the losses of a token's logits cost, beside drawing predictions from them."""
_OVER_LOGITS = ("logits", "task")


@dataclass(frozen=True)
class TrainingForecast:
    """What training will take, over all stages."""

    steps: int
    tokens: int
    """Padding counted."""
    memory: Memory
    operations: Operations


def forecast_training(
    shape: ModelShape, kept: float, stages: Sequence[Stage], lengths: Sequence[int], asks_teacher: bool
) -> TrainingForecast:
    """What it will take to teach a student.

    Args:
        shape: of the teacher.
        kept: the student's share of its parameters.
        stages: plans and schedules, in order.
        lengths: tokens of each training row.
        asks_teacher: whether the teacher runs beside the student: not where a cache answers for it.
    """
    steps = tokens = largest = 0
    work = Operations()
    for stage in stages:
        training = stage.training
        batches = token_batches(lengths, training.find_tokens(lengths))
        one_epoch = TextShape(tuple((len(batch), max(lengths[row] for row in batch)) for batch in batches))
        own = math.ceil(training.epochs * math.ceil(len(batches) / training.accumulate))
        own = own if training.steps is None else training.steps
        if own == 0 or not batches:
            continue
        share = own * training.accumulate / len(batches)
        steps, tokens = steps + own, tokens + round(share * one_epoch.tokens)
        largest = max(largest, one_epoch.largest)
        work += _epoch(shape, kept, stage, one_epoch, asks_teacher).times(share)
    activations = sum(layer.activations for layer in shape.layers) * largest * shape.itemsize
    student = round(LEARNING_BYTES * kept * shape.weight_bytes / shape.itemsize)
    weights = student + (shape.weight_bytes if asks_teacher else 0)
    memory = Memory("training", weights, activations=round((AUTOGRAD_COPIES + asks_teacher) * activations))
    return TrainingForecast(steps, tokens, memory if steps else Memory("training"), work)


def _epoch(shape: ModelShape, kept: float, stage: Stage, text: TextShape, asks_teacher: bool) -> Operations:
    aspects = {term.aspect for term in stage.plan.terms or PRESETS[stage.plan.preset]}
    teacher = asks_teacher and aspects != {"task"}
    parts = []
    for layer in shape.layers:
        once = operations.forward(layer, text)
        parts.append(once.times(3 * kept + teacher))
        parts.append(Operations(elements=LOSS_PASSES * once.elements))
    if aspects & {*_OVER_LOGITS}:
        products = 2.0 * text.tokens * shape.head * (3 + teacher)
        parts.append(Operations(products=products, logits=LOSS_OF_LOGITS * text.tokens * shape.vocabulary))
    return total(parts)
