"""Before the flow: what learning takes, counted: of parameters, activations and losses; and of layers one at a time.

Numbers that are measured stand beside how.
"""

import math
from dataclasses import dataclass

from makd.anatomy import Anatomy
from makd.aspects import activate
from makd.distill import LayerTeacher, LayerwiseConfig, check_teachable
from makd.distill.layerwise.targets import inside_layer
from makd.forecasting import operations
from makd.forecasting.operations import LayerShape, Operations, TextShape, total

PARAMETER_BYTES, GRADIENT_BYTES, MOMENTS_BYTES = 4, 4, 8
"""Of each parameter of a student that learns, which is in float32 then; and besides, of each that changes, its gradient
and AdamW's two moments."""
LEARNING_BYTES = GRADIENT_BYTES + MOMENTS_BYTES
BFLOAT16_SHARE = 0.65
"""What is kept for a backward with products in bfloat16, beside that in float32. Measured: BERT and Llama, 8 x 128
tokens: 0.64 and 0.66."""
KEPT_COPIES, COMPARED_COPIES = 1.3, 0.7
"""Numbers that are kept for the student's backward, for each that the teacher's linears read or write: its own, and
where layers are compared the differences. Measured: MiniLM-L6 at half, 8 x 128 tokens: 1.2 and 0.65
(docs/explanation/cost.md)."""
LOSS_PASSES = 1.0
"""Forwards' elementwise work that comparing layers takes. Measured likewise, 16 x 128 tokens: 0.7."""


def kept_width(precision: str) -> float:
    """Bytes of a number that a layer keeps for its backward: it is as wide as its products."""
    return PARAMETER_BYTES * (BFLOAT16_SHARE if precision == "bfloat16" else 1.0)


@dataclass(frozen=True)
class Lessons:
    """What layers are taught, one after the other, on the way of a factorization: at most, for they may end sooner."""

    settings: LayerwiseConfig
    runs_teacher: bool
    """Whether the teacher's layer is run again: not where its output alone is compared, which is at hand."""

    @staticmethod
    def of(teacher: LayerTeacher, anatomy: Anatomy, text: TextShape) -> "Lessons":
        """What `teacher` has the layers of a model learn from a text.

        Raises:
            SettingError, DataError: they cannot be taught one by one, or not with so little text.
        """
        check_teachable(anatomy, text.batches)
        plan = activate(teacher.plan, anatomy)
        taps = {tap.kind for layer in anatomy.layers for tap in inside_layer(plan, layer).teacher_taps}
        return Lessons(teacher.settings, taps != {"hidden"})

    def work(self, layer: LayerShape, text: TextShape, kept: float) -> Operations:
        """What teaching one layer computes.

        Args:
            layer: of the teacher.
            text: that it is calibrated on.
            kept: the student's share of the layer's weights.
        """
        learned, held_out = self._split(text)
        settings, mean = self.settings, learned.tokens / len(learned.batches)
        epochs = settings.steps * max(1.0, (settings.batch_tokens or 0) / mean) / len(learned.batches)
        looks = 1 + math.ceil(settings.steps / settings.evaluate_every)
        read = operations.forward(layer, learned).times(epochs)
        judged = operations.forward(layer, held_out).times(looks)
        compared = Operations(elements=LOSS_PASSES * (read.elements + judged.elements))
        passes = read.times(3 * kept + self.runs_teacher), judged.times(kept + self.runs_teacher)
        return total((*passes, compared))

    def learning_bytes(self, parameters: float, itemsize: int) -> int:
        """Of a layer of so many parameters, besides the layer itself: gradients, moments, and the best that there was.

        Args:
            parameters: that learn.
            itemsize: bytes of each in the model; narrow ones are in float32 while they learn.
        """
        wide = 0 if itemsize >= PARAMETER_BYTES else PARAMETER_BYTES
        return round(parameters * (LEARNING_BYTES + itemsize + wide))

    def activation_bytes(self, layer: LayerShape, tokens: int) -> int:
        """What is kept of a layer for its backward, with so many tokens at once."""
        numbers = (KEPT_COPIES + COMPARED_COPIES) * layer.activations
        return round(kept_width(self.settings.precision) * numbers * tokens)

    def _split(self, text: TextShape) -> tuple[TextShape, TextShape]:
        """Batches to learn from, and to judge by."""
        every, batches = self.settings.held_out_every, text.batches
        held_out = batches[every - 1 :: every] or batches[-1:]
        learned = [batch for place, batch in enumerate(batches, start=1) if place % every]
        return TextShape(tuple(learned if len(batches) >= every else batches[:-1])), TextShape(held_out)
