"""Station 1: the place of a layer that a student does without: nothing is computed there, and nothing moves up.

Names, indices and cache slots of the other layers stay as they are, so teacher and student line up by index.
"""

from typing import Any

from torch import Tensor, nn


class SkippedLayer(nn.Module):
    """Gives back the hidden states that it gets, in the form in which the layer before it gave them.

    No parameters. It has the layer's plain attributes (numbers, words): some models' own code reads them off their
    layers, as in `layer.attention_type`.
    """

    def __init__(self, outputs: int = 0) -> None:
        """`outputs`: 0 for a layer that returns its hidden states alone; else the length of the tuple it returns."""
        super().__init__()
        self.outputs = outputs

    @staticmethod
    def in_place_of(layer: nn.Module, outputs: int) -> "SkippedLayer":
        """One that stands in for `layer`."""
        skipped = SkippedLayer(outputs)
        for name, value in vars(layer).items():
            if isinstance(value, str | int | float) and name not in vars(skipped):
                setattr(skipped, name, value)
        return skipped

    def forward(self, hidden_states: Tensor, *_others: Any, **_named: Any) -> Tensor | tuple[Tensor | None, ...]:
        """The hidden states, alone or with None for whatever else the layer returned."""
        return (hidden_states, *[None] * (self.outputs - 1)) if self.outputs else hidden_states
