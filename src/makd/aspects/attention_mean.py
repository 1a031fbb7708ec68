"""The attention aspect of station 5 as training wants it: one number, with its gradient made in the same pass.

A training step knows the weight of every row before it starts, the same for all that count. So nothing has to be kept
for the backward but the gradients themselves: the teacher's queries and keys are free at once, and the scores of either
side are computed once where `attention_kl` computes them twice.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from makd.aspects.attention_tiles import Scores, Tile, TileSettings, both_scores, compare, tiles

_CPU_TILE_ELEMENTS = 2**18
"""Scores of a tile: 1 MB of float32. In trials (one core, 8 x 128 and 2 x 512 tokens, 12 heads of 32) as fast as 2^16,
and 1.2 to 2 times as fast as 2^20."""


def attention_loss(
    query_teacher: Float[Tensor, "batch heads queries teacher_dim"],
    key_teacher: Float[Tensor, "batch teacher_key_heads keys teacher_dim"],
    query_student: Float[Tensor, "batch heads queries student_dim"],
    key_student: Float[Tensor, "batch student_key_heads keys student_dim"],
    real: Bool[Tensor, "batch queries"] | None = None,
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    attention_mask_student: Tensor | None = None,
    softcap: float | None = None,
) -> Float[Tensor, ""]:
    """Mean of `attention_kl` over heads and the queries that are `real`; 0 where none is.

    The value's error is that of the scores: about 1e-7 of a score in float32. Kept for the backward are two tensors, of
    the size of the student's query and key.

    All arguments but `real` are those of `attention_kl`, and so is what is raised. `real` is True at the queries that
    count, None where all do; the others may hold anything, NaN included.
    """
    tensors, mask_teacher, mask_student, settings = compare(
        query_teacher,
        key_teacher,
        query_student,
        key_student,
        attention_mask,
        attention_mask_student,
        is_causal,
        scale,
        softcap,
    )
    with torch.autocast(query_student.device.type, enabled=False):
        loss: Tensor = _Loss.apply(*tensors, mask_teacher, mask_student, real, settings)
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_teacher: Tensor,
        key_teacher: Tensor,
        query_student: Tensor,
        key_student: Tensor,
        mask_teacher: Tensor | None,
        mask_student: Tensor | None,
        real: Tensor | None,
        settings: TileSettings,
    ) -> Tensor:
        teacher, student = both_scores(
            query_teacher, query_student, key_teacher, key_student, mask_teacher, mask_student, settings
        )
        work = _Pass(teacher, student, real, ctx.needs_input_grad[2:4], ctx.needs_input_grad[5])
        for tile in tiles(student.query, key_student.shape[2], settings.is_causal, _CPU_TILE_ELEMENTS):
            work.take(tile)
        batch, heads, queries, _ = query_student.shape
        count = torch.tensor(batch * queries, device=query_student.device) if real is None else real.sum()
        factor = 1 / (count.clamp_min(1) * heads).to(student.dtype)
        # the gradients have their tensors' dtypes in any case, so nothing is lost by keeping them so
        grad_mask = work.grad_mask if mask_student is None or work.grad_mask is None else work.grad_mask.flatten(1, 2)
        ctx.save_for_backward(
            None if work.grad_query is None else work.grad_query.flatten(1, 2).to(query_student.dtype),
            None if work.grad_key is None else work.grad_key.to(key_student.dtype),
            None if mask_student is None or grad_mask is None else grad_mask.to(mask_student.dtype),
            factor,
        )
        return work.total * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *slopes, factor = ctx.saved_tensors
        factor = factor * grad_loss
        query, key, mask = (None if slope is None else slope * factor.to(slope.dtype) for slope in slopes)
        return None, None, query, key, None, mask, None, None


class _Pass:
    """Sums over the tiles that were taken so far: of KL, and of its gradients without the mean's factor."""

    def __init__(
        self, teacher: Scores, student: Scores, real: Tensor | None, needed: tuple[bool, bool], needs_mask: bool
    ) -> None:
        self.teacher, self.student = teacher, student
        batch, key_heads, group, queries, _ = student.query.shape
        self.real = None
        if real is not None:
            self.real = real[:, None, None, :, None].expand(batch, key_heads, group, queries, 1)
        self.total = student.key.new_zeros(())
        # in memory as models have queries, (batch, queries, heads, dim): what it flows back to wants no copy
        self.grad_query = torch.empty_like(student.query, dtype=student.dtype) if needed[0] else None
        self.grad_key = torch.zeros_like(student.key) if needed[1] else None
        self.grad_mask = None
        if needs_mask and student.mask is not None:
            self.grad_mask = torch.zeros_like(student.mask, dtype=student.dtype)

    def take(self, tile: Tile) -> None:
        query = self.student.scaled_query(tile, self.real)
        ours, slope = self.student.of(tile, query)
        theirs, _ = self.teacher.of(tile, self.teacher.scaled_query(tile, self.real))
        p_ours, p_theirs = ours.softmax(-1), theirs.softmax(-1)
        kl = _log_sum_exp(ours, p_ours) - _log_sum_exp(theirs, p_theirs)
        kl += torch.linalg.vecdot(p_theirs, theirs.sub_(ours))
        real = None if self.real is None else tile.of_queries(self.real)
        self.total += (kl if real is None else torch.where(real.squeeze(-1), kl, 0)).sum()
        difference = p_ours.sub_(p_theirs)  # d KL / d score
        if self.grad_mask is not None:
            part = tile.of_mask(self.grad_mask)
            counted = difference if real is None else torch.where(real, difference, 0)
            part.add_(counted.sum_to_size(part.shape))
        if slope is not None:
            difference.mul_(slope)
        if self.grad_query is not None:
            pulled = difference.flatten(2, 3) @ tile.of_keys(self.student.key)
            pulled = pulled.mul_(self.student.scale).unflatten(2, difference.shape[2:4])
            tile.of_queries(self.grad_query).copy_(pulled if real is None else pulled.masked_fill_(~real, 0))
        if self.grad_key is not None:
            tile.of_keys(self.grad_key).add_(difference.flatten(2, 3).mT @ query)


def _log_sum_exp(scores: Tensor, probabilities: Tensor) -> Tensor:
    """Of each row, from its largest score and that score's probability, which is at least 1 / keys."""
    return scores.amax(-1) - probabilities.amax(-1).log_()
