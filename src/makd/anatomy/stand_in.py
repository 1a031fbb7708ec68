"""Station 1: what all modules have in common that stand in a student in the place of the architecture's own."""

from typing import Any

import torch
from torch import Tensor, nn

NUMBER = (1, 1, 1, 1)
"""Shape of an identity: one number, with more axes than any weight that it stands in the place of."""


class StandIn(nn.Module):
    """A module that a student has in the place of another, and which says of what student it is.

    In a file, its `identity` has the name of the weight that the other module would have there (`stands_for`). So code
    that knows nothing of makd finds a tensor of a shape that cannot fit, and refuses the file; else it would fill the
    weight at random. And weights of one student do not pass for those of another.
    """

    identity: Tensor
    whole_numbers = 0
    """How many numbers it has that are no weights, and count as parameters."""

    def __init__(self, stands_for: str = "weight") -> None:
        """`stands_for`: a parameter of the module that is replaced, by its name there; "" replaces a parameter."""
        super().__init__()
        self.stands_for = stands_for
        self.register_buffer("identity", torch.zeros(NUMBER, dtype=torch.int64))

    def name_in_files(self, name: str) -> str:
        """What the identity of the module called `name` is called in a file."""
        return ".".join(part for part in (name, self.stands_for) if part)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Take weights, from memory or a file, but stay who the config says one is."""
        state_dict.pop(self.name_in_files(prefix.removesuffix(".")), None)
        state_dict[f"{prefix}identity"] = self.identity
        super()._load_from_state_dict(state_dict, prefix, *arguments)
