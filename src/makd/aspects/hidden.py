"""Station 5, states: outputs of layers, of linears inside them and of experts, compared token by token.

`normalised_mse` is the loss of the aspects `hidden`, `matrix` and `experts`. It reads each side once and keeps one
tensor (the difference) for the backward pass.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor
from torch.autograd.function import once_differentiable

_LEAST_VARIANCE = 1e-6
"""Share of the mean square below which float32 cannot tell a variance from rounding."""

LEAST_NORM = 1e-6
"""Vectors shorter than this have no direction; a smaller bound would let their gradients overflow."""


def normalised_mse(
    student: Float[Tensor, "batch tokens channels"],
    teacher: Float[Tensor, "batch tokens channels"],
    mask: Bool[Tensor, "batch tokens"] | None,
    unit: float | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference over real tokens and channels, in units of the teacher's variance there.

    0 is equal; 1 is what predicting each channel's mean would score, at any layer of any model, so that layers weigh
    alike in a sum.

    The unit is the variance over real tokens around each channel's own mean, averaged over channels. Around its own
    mean, because outlier channels of transformers stand far off zero at every token alike: that offset is a bias, which
    carries nothing about the text and would drown the rest. Averaged over channels and not divided channel by channel,
    because channels that hardly vary would then be weighted up without bound.

    It lets queries, keys, values, up and down projections be added up, too, though their outputs differ in scale by
    orders of magnitude. Of a linear, 1 is what rank 0 with the best bias scores. Source: arXiv 2604.03110, matrix
    distillation; the paper's has no unit.

    Args:
        student: may hold anything at padding, NaN included; so may `teacher`.
        teacher: gets no gradient.
        mask: True at real tokens; None where all are, which saves passes over both sides. With none, the loss is 0.
        unit: what is divided by, of `variance_unit`; None makes it of this batch. A mean over several batches is one
            only in a unit that they share.

    Returns:
        A scalar of float32 (float64 for float64 inputs), whatever the inputs are. Where the teacher does not vary (one
        token), the unit is its mean square; where it is all zeros, 1.
    """
    with torch.autocast(student.device.type, enabled=False):
        loss: Tensor = _NormalisedMse.apply(student, teacher, mask, unit)
    return loss


def variance_unit(
    count: Num[Tensor, ""], squares: Float[Tensor, ""], sums: Float[Tensor, " channels"]
) -> Float[Tensor, ""]:
    """What `normalised_mse` divides by, of any number of tokens.

    Args:
        count: tokens.
        squares: sum of the squares of all their channels.
        sums: of each channel over the tokens.
    """
    mean_square = squares / (count * len(sums))
    variance = mean_square - (sums / count).square().mean()
    unit = torch.where(variance > _LEAST_VARIANCE * mean_square, variance, mean_square)
    return torch.where(unit > 0, unit, torch.ones_like(unit))


def variance_sums(
    teacher: Float[Tensor, "batch tokens channels"], mask: Bool[Tensor, "batch tokens"] | None
) -> tuple[Num[Tensor, ""], Float[Tensor, ""], Float[Tensor, " channels"]]:
    """What `variance_unit` takes, of one batch: sums over batches are those of all their tokens."""
    if mask is not None:  # filled, not multiplied: what stands in the padding may be NaN
        teacher = teacher.masked_fill(~mask.unsqueeze(-1), 0)
    return _sums(teacher.to(torch.promote_types(teacher.dtype, torch.float32)), _count(teacher, mask))


def cosine_distance(
    student: Float[Tensor, "batch tokens channels"],
    teacher: Float[Tensor, "batch tokens channels"],
    mask: Bool[Tensor, "batch tokens"] | None,
) -> Float[Tensor, ""]:
    """Mean of 1 - cosine over real tokens; in [0, 2]. Only directions are compared.

    Computed as half the squared distance of the unit vectors, which is exact near 0. So PKD's patient loss (arXiv
    1908.09355, the squared distance itself) is twice this. Source: DistilBERT, arXiv 1910.01108.

    Arguments and result are as in `normalised_mse`; a token of zeros has no direction, and counts 1/2.
    """
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)

    def directions(states: Tensor) -> Tensor:
        known = states if mask is None else torch.where(mask.unsqueeze(-1), states, 0)
        return torch.nn.functional.normalize(known.to(wide), dim=-1, eps=LEAST_NORM)

    with torch.autocast(student.device.type, enabled=False):
        distances = (directions(student) - directions(teacher.detach())).square().sum(-1) / 2
    return distances.mean() if mask is None else distances.sum() / mask.sum().clamp_min(1)


class _NormalisedMse(torch.autograd.Function):
    """Written out because autograd would keep the teacher's and the student's masked copies besides the difference."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor | None, unit: float | None) -> Tensor:
        wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        teacher = teacher.to(wide)
        difference = student.to(wide) - teacher
        if mask is not None:  # filled, not multiplied: what stands in the padding may be NaN
            padding = ~mask.unsqueeze(-1)
            difference.masked_fill_(padding, 0)
            teacher = teacher.masked_fill(padding, 0) if unit is None else teacher
        count = _count(student, mask)
        divisor = variance_unit(*_sums(teacher, count)) if unit is None else teacher.new_tensor(unit)
        factor = 1 / (count * student.shape[-1] * divisor)
        loss = _sum_of_squares(difference) * factor
        if ctx.needs_input_grad[0]:
            # the gradient has the student's dtype in any case, so nothing is lost by keeping it so
            ctx.save_for_backward(difference.to(student.dtype), factor)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        difference, factor = ctx.saved_tensors
        return torch.mul(difference, 2 * factor * grad_loss, out=torch.empty_like(difference)), None, None, None


def _count(states: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens that count, 1 at least."""
    if mask is not None:
        return mask.sum().clamp_min(1)
    return torch.tensor(max(1, states[..., 0].numel()), device=states.device)


def _sums(teacher: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, squares and channels' sums of a teacher whose padding is 0."""
    rows = teacher.flatten(0, 1)
    # a product with ones, which all cores share
    return count, _sum_of_squares(teacher), torch.ones_like(rows[:, 0]) @ rows


def _sum_of_squares(values: Tensor) -> Tensor:
    """Token by token first: one sum over millions of numbers would lose digits."""
    total: Tensor = torch.linalg.vector_norm(values, dim=-1).square().sum()
    return total
