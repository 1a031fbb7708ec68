"""Aspect `lengths`: how long the hidden state of each token is, whatever its direction."""

import torch
from torch import Tensor

from makd.aspects import Aspect


def loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean over real tokens of (log ‖student‖ - log ‖teacher‖)²."""
    ours, theirs = (side[mask].float().norm(dim=-1).clamp(min=1e-6).log() for side in (student, teacher))
    return torch.mean((ours - theirs).square())


LENGTHS = Aspect("lengths of hidden states: squared difference of their logarithms", at="hidden", loss=loss)
