"""Before the flow: what a student's training will take: steps, tokens, memory, and counted operations."""

from collections.abc import Sequence
from dataclasses import dataclass

from makd.aspects import INSIDE, OF_HEAD, Place
from makd.config import Stage
from makd.data import token_batches
from makd.distill import TrainingConfig
from makd.forecasting import operations
from makd.forecasting.memory import Memory
from makd.forecasting.operations import Operations, TextShape, total
from makd.forecasting.shapes import ModelShape

PARAMETER_BYTES, LEARNING_BYTES = 4, 12
"""Of each parameter of a student that learns, which is in float32 then; and besides, of each that changes, its gradient
and AdamW's two moments."""
BFLOAT16_SHARE = 0.65
"""What is kept for a backward with products in bfloat16, beside that in float32. Measured: BERT and Llama, 8 x 128
tokens: 0.64 and 0.66."""
KEPT_COPIES, COMPARED_COPIES = 1.3, 0.7
"""Numbers that are kept for the student's backward, for each that the teacher's linears read or write: its own, and
where layers are compared the differences. Measured: MiniLM-L6 at half, 8 x 128 tokens: 1.2 and 0.65
(docs/explanation/cost.md)."""
LOSS_PASSES = 1.0
"""Forwards' elementwise work that comparing layers takes. Measured likewise, 16 x 128 tokens: 0.7."""
LOSS_OF_LOGITS = 0.5
"""What the losses of a token's logits cost, beside drawing predictions from them."""


@dataclass(frozen=True)
class TrainingForecast:
    """What training will take, over all stages."""

    steps: int
    tokens: int
    """Padding counted."""
    memory: Memory
    operations: Operations


@dataclass(frozen=True)
class LearnerShape:
    """Of a student: what of it can learn."""

    parameters: int
    linears: int
    """Parameters of its linears."""
    kept: float
    """Their share of the teacher's."""
    factors: tuple[tuple[int, int, int], ...] = ()
    """(in, rank, out) of each linear that has factors."""

    def learning(self, training: TrainingConfig) -> int:
        """Parameters that change."""
        if training.trainable == "linears":
            return self.linears
        if training.trainable == "adapters":
            return training.adapter_rank * sum(size + 2 * rank + out for size, rank, out in self.factors)
        return self.parameters


@dataclass(frozen=True)
class Spread:
    """How a training is spread over processes, each of which has a memory of its own."""

    processes: int = 1
    """Those that FSDP spreads parameters over; 1 without it."""
    is_known: bool = True
    """Whether that is how it is done; another engine may put them anywhere."""


def forecast_training(
    shape: ModelShape,
    student: LearnerShape,
    stages: Sequence[Stage],
    lengths: Sequence[Sequence[int]],
    asks_teacher: bool,
    spread: Spread | None = None,
) -> TrainingForecast:
    """What it will take to teach a student.

    Args:
        shape: of the teacher.
        student: what of it can learn.
        stages: plans and schedules, in order, with the products that they will have.
        lengths: of each stage, the tokens of each training row, as `makd.distill.training_lengths` finds them.
        asks_teacher: whether the teacher runs beside the student: not where a cache answers for it.
        spread: over processes, if it is.
    """
    steps = tokens = 0
    memory = Memory("training")
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
        own_memory = _memory(shape, student, stage, one_epoch.largest, asks_teacher, spread or Spread())
        memory = max(memory, own_memory, key=lambda one: one.total)
        work += _epoch(shape, student.kept, stage, one_epoch, asks_teacher).times(share)
    return TrainingForecast(steps, tokens, memory, work)


def _memory(
    shape: ModelShape, student: LearnerShape, stage: Stage, tokens: int, asks_teacher: bool, spread: Spread
) -> Memory:
    """Of one stage, in each process, with so many tokens at once."""
    training = stage.training
    learner = PARAMETER_BYTES * student.parameters + LEARNING_BYTES * student.learning(training)
    learner //= spread.processes
    teacher = shape.weight_bytes // (spread.processes if training.shard_teacher else 1) if asks_teacher else 0
    # what a layer keeps is as wide as its products; what layers hand on is in float32, as the student is
    width = PARAMETER_BYTES * (BFLOAT16_SHARE if training.precision == "bfloat16" else 1.0)
    layers = [layer.activations for layer in shape.layers]
    compared = COMPARED_COPIES * sum(layers) if _places(stage) & {*INSIDE} else 0.0
    numbers = width * (KEPT_COPIES * (max(layers) if training.gradient_checkpointing else sum(layers)) + compared)
    if training.gradient_checkpointing:
        numbers += PARAMETER_BYTES * shape.hidden * len(layers)
    return Memory(
        "training",
        learner + teacher,
        activations=round(numbers * tokens),
        unsure=0 if spread.is_known else learner,
    )


def _places(stage: Stage) -> set[Place]:
    return {term.place for term in stage.plan.wanted}


def _epoch(shape: ModelShape, kept: float, stage: Stage, text: TextShape, asks_teacher: bool) -> Operations:
    places = _places(stage)
    teacher = asks_teacher and places != {"labels"}
    parts = []
    for layer in shape.layers:
        once = operations.forward(layer, text)
        parts.append(once.times(3 * kept + teacher))
        if places & {*INSIDE}:
            parts.append(Operations(elements=LOSS_PASSES * once.elements))
    if places & {*OF_HEAD}:
        products = 2.0 * text.tokens * shape.head * (3 + teacher)
        parts.append(Operations(products=products, logits=LOSS_OF_LOGITS * text.tokens * shape.vocabulary))
    return total(parts)
