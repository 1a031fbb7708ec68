"""Station 1: the place of a layer that a student does without: nothing is computed there, and nothing moves up.

Names, indices and cache slots of the other layers stay as they are, so teacher and student line up by index.
"""

from typing import Any

from torch import Tensor, nn

from makd.anatomy.stand_in import StandIn


class SkippedLayer(StandIn):
    """Gives back the hidden states that it gets, in the form in which the layer before it gave them.

    No parameters. It has the layer's plain attributes (numbers, words): some models' own code reads them off their
    layers, as in `layer.attention_type`. Its setters do nothing: BigBird calls `set_attention_type` of all layers.
    """

    def __init__(self, outputs: int = 0, stands_for: str = "weight") -> None:
        """A layer that does nothing.

        Args:
            outputs: 0 for a layer that returns its hidden states alone; else the length of the tuple it returns.
            stands_for: a parameter of the layer that it replaces.
        """
        super().__init__(stands_for)
        self.outputs = outputs

    @staticmethod
    def in_place_of(layer: nn.Module, outputs: int) -> "SkippedLayer":
        """One that stands in for `layer`."""
        skipped = SkippedLayer(outputs, next((name for name, _ in layer.named_parameters()), "weight"))
        for name, value in vars(layer).items():
            if isinstance(value, str | int | float) and name not in vars(skipped):
                setattr(skipped, name, value)
        for name in dir(type(layer)):
            if name.startswith("set_") and not hasattr(skipped, name):
                setattr(skipped, name, _do_nothing)
        return skipped

    def forward(self, hidden_states: Tensor, *_others: Any, **_named: Any) -> Tensor | tuple[Tensor | None, ...]:
        """The hidden states, alone or with None for whatever else the layer returned."""
        return (hidden_states, *[None] * (self.outputs - 1)) if self.outputs else hidden_states


def _do_nothing(*_values: Any, **_named: Any) -> None:
    """What a layer that does nothing does when it is told how to do it."""
