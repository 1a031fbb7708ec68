"""Before the flow: what a student's training will take: steps, tokens, memory, and counted operations."""

from collections.abc import Sequence
from dataclasses import dataclass

from makd.config import Stage
from makd.data import token_batches
from makd.forecasting import operations
from makd.forecasting.memory import Memory
from makd.forecasting.operations import Operations, TextShape, total
from makd.forecasting.shapes import ModelShape

LEARNING_BYTES = 16
"""Of a parameter that learns: itself, its gradient and AdamW's two moments, in float32."""
KEPT_COPIES, COMPARED_COPIES = 1.3, 0.7
"""Numbers that are kept for the student's backward, for each that the teacher's linears read or write: its own, and
where layers are compared the differences. Measured: MiniLM-L6 at half, 8 x 128 tokens: 1.2 and 0.65
(docs/explanation/cost.md)."""
LOSS_PASSES = 1.0
"""Forwards' elementwise work that comparing layers takes. Measured likewise, 16 x 128 tokens: 0.7."""
LOSS_OF_LOGITS = 0.5
"""What the losses of a token's logits cost, beside drawing predictions from them."""
_OVER_LOGITS = {"logits", "task"}
_OF_OUTPUTS = _OVER_LOGITS | {"embedding", "similarity"}


@dataclass(frozen=True)
class TrainingForecast:
    """What training will take, over all stages."""

    steps: int
    tokens: int
    """Padding counted."""
    memory: Memory
    operations: Operations


def forecast_training(
    shape: ModelShape,
    parameters: int,
    kept: float,
    stages: Sequence[Stage],
    lengths: Sequence[Sequence[int]],
    asks_teacher: bool,
) -> TrainingForecast:
    """What it will take to teach a student.

    Args:
        shape: of the teacher.
        parameters: of the student.
        kept: its share of the parameters of the linears.
        stages: plans and schedules, in order.
        lengths: of each stage, the tokens of each training row, as `makd.distill.training_lengths` finds them.
        asks_teacher: whether the teacher runs beside the student: not where a cache answers for it.
    """
    steps = tokens = largest = 0
    work = Operations()
    for stage, rows in zip(stages, lengths, strict=True):
        training = stage.training
        batches = token_batches(rows, training.find_tokens(rows))
        one_epoch = TextShape(tuple((len(batch), max(rows[row] for row in batch)) for batch in batches))
        own = training.find_steps(len(batches))
        if own == 0 or not batches:
            continue
        share = own * training.accumulate / len(batches)
        steps, tokens = steps + own, tokens + round(share * one_epoch.tokens)
        largest = max(largest, one_epoch.largest)
        work += _epoch(shape, kept, stage, one_epoch, asks_teacher).times(share)
    activations = sum(layer.activations for layer in shape.layers) * largest * shape.itemsize
    compares = any(_aspects(stage) - _OF_OUTPUTS for stage in stages)
    copies = KEPT_COPIES + (COMPARED_COPIES if compares else 0.0)
    weights = LEARNING_BYTES * parameters + (shape.weight_bytes if asks_teacher else 0)
    return TrainingForecast(steps, tokens, Memory("training", weights, activations=round(copies * activations)), work)


def _aspects(stage: Stage) -> set[str]:
    return {term.aspect for term in stage.plan.wanted}


def _epoch(shape: ModelShape, kept: float, stage: Stage, text: TextShape, asks_teacher: bool) -> Operations:
    aspects = _aspects(stage)
    teacher = asks_teacher and aspects != {"task"}
    parts = []
    for layer in shape.layers:
        once = operations.forward(layer, text)
        parts.append(once.times(3 * kept + teacher))
        if aspects - _OF_OUTPUTS:
            parts.append(Operations(elements=LOSS_PASSES * once.elements))
    if aspects & _OVER_LOGITS:
        products = 2.0 * text.tokens * shape.head * (3 + teacher)
        parts.append(Operations(products=products, logits=LOSS_OF_LOGITS * text.tokens * shape.vocabulary))
    return total(parts)
