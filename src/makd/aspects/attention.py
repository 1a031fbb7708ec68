"""The attention aspect of station 5: what each token looks at, compared without ever holding an attention matrix.

`attention_kl` is the aspect. Where the device has a fused kernel that returns log-sum-exps, it goes that way
(`makd.aspects.attention_kernels`). This module has the other, for every device and case: through tiles of the score
matrices, twice, once for the value (and the query's gradient) and once in the backward pass for the key's gradient.
"""

import logging
from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from makd.aspects.attention_kernels import kernel_kl, kernel_refusal
from makd.aspects.attention_tiles import Scores, Tile, TileSettings, both_scores, compare, tiles

_logger = logging.getLogger(__name__)


def attention_kl(
    query_teacher: Float[Tensor, "batch heads queries teacher_dim"],
    key_teacher: Float[Tensor, "batch teacher_key_heads keys teacher_dim"],
    query_student: Float[Tensor, "batch heads queries student_dim"],
    key_student: Float[Tensor, "batch student_key_heads keys student_dim"],
    attention_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    attention_mask_student: Tensor | None = None,
    softcap: float | None = None,
    method: Literal["kernel", "tiles"] = "kernel",
) -> Float[Tensor, "batch heads queries"]:
    """KL(P_teacher ‖ P_student) of every head and query in nats, P = softmax(query keyᵀ · scale + mask).

    Queries and keys are taken as attention gets them: after rotary or any other treatment of positions. Key heads may
    be fewer than heads (grouped-query attention); they are not copied out. The gradient is that of a cross-entropy:
    d KL_i / d score_ij = P_student,ij - P_teacher,ij.

    Memory beyond inputs and outputs is one tile and two tensors of the student's query's size, not queries x keys.
    bfloat16 and float16 are taken to float32, tile by tile; float64 stays.

    Args:
        query_teacher: gets no gradient; nor does `key_teacher`.
        key_teacher: finite everywhere, as attention itself demands: a key that is masked still enters products.
        query_student: as the teacher's in heads and queries; its head_dim may differ. First-order gradients only.
        key_student: as the teacher's in keys.
        attention_mask: added to the scores, or boolean with True where a key may be seen; broadcastable to (batch,
            heads, queries, keys). A query that may see no key has KL 0 and gradient 0.
        is_causal: query i sees keys 0 to i only, besides what `attention_mask` says.
        scale: of both sides; by default each side's head_dim ** -0.5.
        attention_mask_student: the student's own mask, where its position bias is trained (T5): it gets a gradient.
            It has to hide the same keys as the teacher's. By default the teacher's.
        softcap: scores become softcap · tanh(score / softcap) before the mask (Gemma 2).
        method: "kernel" takes the device's fused kernel, and tiles where there is none for the case (logged once);
            "tiles" takes tiles. On idle CPU cores tiles are 1.4 to 2 times faster without `is_causal`, and they keep
            the digits of small divergences (error 1e-8 instead of 1e-6 nats); the kernel holds its pace when other
            processes want the cores, where the many short operations of tiles wait for each other.

    Returns:
        KL in float32 (float64 for float64 inputs). Rows of padded queries mean nothing: leave them out by
        `torch.where`, and what stands in those queries, NaN included, has no influence on any gradient.

    Raises:
        ValueError: heads that key heads do not divide, or a mask that does not broadcast to the scores.
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
    if method == "kernel":
        refusal = kernel_refusal(
            query_student.device, softcap=softcap, own_student_mask=attention_mask_student is not None
        )
        if refusal is None:
            return kernel_kl(*tensors, mask_teacher, is_causal, settings.scales)
        _log_once(refusal)
    with torch.autocast(query_student.device.type, enabled=False):
        kl: Tensor = _TiledKL.apply(*tensors, mask_teacher, mask_student, settings)
    return kl


@cache
def _log_once(refusal: str) -> None:
    _logger.info("Attention KL goes by tiles instead of a fused kernel: %s.", refusal)


class _TiledKL(torch.autograd.Function):
    """KL by tiles of scores, which the backward pass computes again instead of reading them back."""

    @staticmethod
    def forward(
        ctx: Any,
        query_teacher: Tensor,
        key_teacher: Tensor,
        query_student: Tensor,
        key_student: Tensor,
        mask_teacher: Tensor | None,
        mask_student: Tensor | None,
        settings: TileSettings,
    ) -> Tensor:
        teacher, student = both_scores(
            query_teacher, query_student, key_teacher, key_student, mask_teacher, mask_student, settings
        )
        kl = student.key.new_empty(student.query.shape[:-1])
        slant = student.key.new_empty(student.query.shape) if ctx.needs_input_grad[2] else None
        for tile in tiles(student.query, key_student.shape[2], settings.is_causal):
            log_p_teacher = teacher.of(tile, teacher.scaled_query(tile))[0].log_softmax(-1)
            scores, slope = student.of(tile, student.scaled_query(tile))
            log_p_student = scores.log_softmax(-1)
            p_teacher = log_p_teacher.exp()
            tile.of_queries(kl).copy_(torch.linalg.vecdot(p_teacher, log_p_teacher.sub_(log_p_student)))
            if slant is not None:
                difference = log_p_student.exp_().sub_(p_teacher)
                if slope is not None:
                    difference.mul_(slope)
                pulled = difference.flatten(2, 3) @ tile.of_keys(student.key)
                tile.of_queries(slant).copy_(pulled.unflatten(2, difference.shape[2:4]))
        ctx.settings = settings
        ctx.save_for_backward(query_teacher, key_teacher, query_student, key_student, mask_teacher, mask_student, slant)
        return kl.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        query_teacher, key_teacher, query_student, key_student, mask_teacher, mask_student, slant = ctx.saved_tensors
        settings = ctx.settings
        weight = grad_kl.unsqueeze(-1)  # (batch, heads, queries, 1)
        counts = weight != 0  # rows that the caller left out, padding, may hold NaN: 0 · NaN must not reach a sum
        grad_query = grad_key = grad_mask = None
        if slant is not None:
            grad_query = slant.flatten(1, 2) * (weight * settings.scales[1])
            grad_query = grad_query.masked_fill_(~counts, 0).to(query_student.dtype)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[5]:
            teacher, student = both_scores(
                query_teacher, query_student, key_teacher, key_student, mask_teacher, mask_student, settings
            )
            grad_key = torch.zeros_like(student.key)
            if student.mask is not None and ctx.needs_input_grad[5]:
                grad_mask = torch.zeros_like(student.mask, dtype=student.dtype)
            weight, counts = (tensor.unflatten(1, student.query.shape[1:3]) for tensor in (weight, counts))
            with torch.autocast(grad_kl.device.type, enabled=False):
                for tile in tiles(student.query, key_student.shape[2], settings.is_causal):
                    _add_tile_gradients(tile, teacher, student, weight, counts, grad_key, grad_mask)
            grad_key = grad_key.to(key_student.dtype)
        if grad_mask is not None:
            grad_mask = grad_mask.flatten(1, 2).to(mask_student.dtype)
        return None, None, grad_query, grad_key, None, grad_mask, None


def _add_tile_gradients(
    tile: Tile,
    teacher: Scores,
    student: Scores,
    weight: Tensor,
    counts: Tensor,
    grad_key: Tensor,
    grad_mask: Tensor | None,
) -> None:
    """Add one tile's part of d (Σ weight · KL) / d key and / d mask of the student."""
    query = student.scaled_query(tile, counts)
    scores, slope = student.of(tile, query)
    difference = scores.softmax(-1)
    difference.sub_(teacher.of(tile, teacher.scaled_query(tile, counts))[0].softmax(-1))
    row_weight = tile.of_queries(weight)
    if grad_mask is not None:
        part = tile.of_mask(grad_mask)
        part.add_((difference * row_weight).sum_to_size(part.shape))
    if slope is not None:
        difference.mul_(slope)
    tile.of_keys(grad_key).add_(difference.flatten(2, 3).mT @ (query * row_weight.flatten(2, 3)))
