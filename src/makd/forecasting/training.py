"""Before the flow: what a student's training will take: steps, tokens, memory, and counted operations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from makd.aspects import INSIDE, OF_HEAD, Place
from makd.config import Stage
from makd.data import token_batches
from makd.distill import TrainingConfig
from makd.forecasting import operations
from makd.forecasting.learning import (
    COMPARED_COPIES,
    GRADIENT_BYTES,
    KEPT_COPIES,
    LEARNING_BYTES,
    LOSS_PASSES,
    PARAMETER_BYTES,
    kept_width,
)
from makd.forecasting.memory import Memory
from makd.forecasting.operations import Operations, TextShape, total
from makd.forecasting.shapes import ModelShape

LOSS_OF_LOGITS = 0.5
"""What the losses of a token's logits cost, beside drawing predictions from them."""
DRAWN_BYTES = 38
"""Of each logit that a token of a completion is drawn from (`makd.generation`): logits, probabilities and their sums.
Measured, a vocabulary of 20,000: 33, and 38 where `top_p` leaves tokens out."""


@dataclass(frozen=True)
class TrainingForecast:
    """What training will take, over all stages."""

    steps: int
    tokens: int
    """Padding counted."""
    memory: Memory
    """Of the moment that needs most: of a step (`training`), or while completions are written for one (`writing`)."""
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
        asks_teacher: whether the teacher runs beside the student: not where a cache answers for it. Its weights are in
            memory all the same: it measures the student.
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
        own_memory = _memories(shape, student, stage, one_epoch, spread or Spread())
        memory = max(memory, *own_memory, key=lambda one: one.total)
        work += _epoch(shape, student.kept, stage, one_epoch, asks_teacher).times(share)
    return TrainingForecast(steps, tokens, memory, work)


def _memories(
    shape: ModelShape, student: LearnerShape, stage: Stage, text: TextShape, spread: Spread
) -> Iterator[Memory]:
    """Of one stage, in each process: of a step, and of the writing for one."""
    training, completions = stage.training, stage.plan.writers
    learning = student.learning(training)
    learner = (PARAMETER_BYTES * student.parameters + LEARNING_BYTES * learning) // spread.processes
    teacher = shape.weight_bytes // (spread.processes if training.shard_teacher else 1)
    unsure = 0 if spread.is_known else learner
    yield Memory("training", learner + teacher, activations=_step_bytes(shape, stage, text.largest), unsure=unsure)
    written = 0
    if completions.by_student:  # for all batches of a step at once
        at_once = _written_at_once(text, training.accumulate)
        written = _writing_bytes(shape, at_once, completions.max_new_tokens, PARAMETER_BYTES)
    if completions.teacher_share > 0:
        one = _written_at_once(text, 1)
        written = max(written, _writing_bytes(shape, one, completions.max_new_tokens, shape.itemsize))
    if written:  # before the step, which has no gradients yet
        gradients = GRADIENT_BYTES * learning // spread.processes
        unsure = max(0, unsure - gradients)
        yield Memory("writing", learner - gradients + teacher, activations=written, unsure=unsure)


def _step_bytes(shape: ModelShape, stage: Stage, tokens: int) -> int:
    """Activations of a step with so many tokens at once."""
    training = stage.training
    # what a layer keeps is as wide as its products; what layers hand on is in float32, as the student is
    width, layers = kept_width(training.precision), [layer.activations for layer in shape.layers]
    compared = COMPARED_COPIES * sum(layers) if _places(stage) & {*INSIDE} else 0.0
    numbers = width * (KEPT_COPIES * (max(layers) if training.gradient_checkpointing else sum(layers)) + compared)
    if training.gradient_checkpointing:
        numbers += PARAMETER_BYTES * shape.hidden * len(layers)
    return round(numbers * tokens)


def _written_at_once(text: TextShape, batches: int) -> tuple[int, int]:
    """(rows, tokens of a row) of the largest generation for so many batches; all rows are as wide as the widest.

    Which batches meet in a step is a matter of chance: the others are taken to have as many rows as there are on
    average.
    """
    mean = sum(rows for rows, _ in text.batches) / len(text.batches)
    found = [(rows + round((batches - 1) * mean), tokens) for rows, tokens in text.batches]
    return max(found, key=lambda one: one[0] * one[1])


def _writing_bytes(shape: ModelShape, at_once: tuple[int, int], new: int, itemsize: int) -> int:
    """Of a generation, when it has read the prompts or when it writes the last of its `new` tokens: keys and values."""
    rows, tokens = at_once
    keys = [layer.keys for layer in shape.layers]
    reading = max(1, tokens - new) * (sum(keys) + max(layer.activations for layer in shape.layers)) * itemsize
    growing = tokens * (sum(keys) + max(keys)) * itemsize  # those of a layer twice, with the new token and without
    return rows * max(reading, growing + shape.vocabulary * DRAWN_BYTES)


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
