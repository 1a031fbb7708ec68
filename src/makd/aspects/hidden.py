"""The hidden aspect of station 5: a layer's output, compared in units of the teacher's own variance.

`normalised_mse` is what the hidden and the matrix aspect share. It reads each side once and keeps one tensor (the
difference) for the backward pass.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_LEAST_VARIANCE = 1e-6
"""Share of the mean square below which float32 cannot tell a variance from rounding."""


def hidden_mse(
    student: Float[Tensor, "batch tokens hidden"],
    teacher: Float[Tensor, "batch tokens hidden"],
    mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Mean squared difference of a layer's output, in units of the teacher's variance: see `normalised_mse`."""
    return normalised_mse(student, teacher, mask)


def normalised_mse(
    student: Float[Tensor, "batch tokens channels"],
    teacher: Float[Tensor, "batch tokens channels"],
    mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Mean squared difference over real tokens and channels, in units of the teacher's variance there.

    0 is equal; 1 is what predicting each channel's mean would score, at any layer of any model, so that layers weigh
    alike in a sum.

    The unit is the variance over real tokens around each channel's own mean, averaged over channels. Around its own
    mean, because outlier channels of transformers stand far off zero at every token alike: that offset is a bias, which
    carries nothing about the text and would drown the rest. Averaged over channels and not divided channel by channel,
    because channels that hardly vary would then be weighted up without bound.

    Args:
        student: may hold anything at padding, NaN included; so may `teacher`.
        teacher: gets no gradient.
        mask: True at real tokens. With none, the loss is 0.

    Returns:
        A scalar of float32 (float64 for float64 inputs), whatever the inputs are. Where the teacher does not vary (one
        token), the unit is its mean square; where it is all zeros, 1.
    """
    with torch.autocast(student.device.type, enabled=False):
        loss: Tensor = _NormalisedMse.apply(student, teacher, mask)
    return loss


class _NormalisedMse(torch.autograd.Function):
    """Written out because autograd would keep the teacher's and the student's masked copies besides the difference."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        teacher = teacher.to(wide)
        difference = student.to(wide) - teacher
        factor = 1 / (mask.sum().clamp_min(1) * student.shape[-1] * _unit(teacher, mask))
        if ctx.needs_input_grad[0]:
            # the gradient has the student's dtype in any case, so nothing is lost by keeping it so
            ctx.save_for_backward(difference.to(student.dtype), mask, factor)
        return _sum_of_squares(difference, mask) * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        difference, mask, factor = ctx.saved_tensors
        gradient = torch.where(mask.unsqueeze(-1), difference, 0)
        return gradient.mul_(2 * factor * grad_loss), None, None


def _unit(teacher: Tensor, mask: Tensor) -> Tensor:
    """What `normalised_mse` divides by: the variance over real tokens, averaged over channels."""
    count = mask.sum().clamp_min(1)
    mean_square = _sum_of_squares(teacher, mask) / (count * teacher.shape[-1])
    # a product with the mask reads the teacher once; not-a-numbers of real tokens are in the difference and show there
    rows = torch.nan_to_num(teacher, nan=0.0, posinf=0.0, neginf=0.0).flatten(0, 1)
    square_of_means = (mask.flatten().to(rows.dtype) @ rows / count).square().mean()
    variance = mean_square - square_of_means
    unit = torch.where(variance > _LEAST_VARIANCE * mean_square, variance, mean_square)
    return torch.where(unit > 0, unit, torch.ones_like(unit))


def _sum_of_squares(values: Tensor, mask: Tensor) -> Tensor:
    """Over real tokens. Masked token by token, after the channels are summed: padding's numbers stay in their rows."""
    by_token = torch.linalg.vector_norm(values, dim=-1).square()
    return torch.where(mask, by_token, 0).sum()
