"""The attention aspect of station 5: what each token looks at, compared without ever holding an attention matrix.

`attention_kl` is the aspect. Where the device has a fused kernel that returns log-sum-exps, it goes that way
(`makd.aspects.attention_kernels`). This module has the other, for every device and case: through tiles of the score
matrices, twice, once for the value (and the query's gradient) and once in the backward pass for the key's gradient.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from makd.aspects.attention_kernels import HIDDEN, kernel_kl, kernel_refusal

_logger = logging.getLogger(__name__)

_LEAST_ROWS = 64
"""Fewer rows of scores at a time make slow matrix products, whatever the cache."""
_CPU_TILE_ELEMENTS = 2**20
"""Scores of a tile: 4 MB of float32. The largest that stayed near the best in trials from 2^16 to 2^20: every operation
on a tile makes all threads meet, which takes milliseconds where other processes want the cores."""
_GPU_TILE_ELEMENTS = 2**24
"""Scores of a tile where launching a kernel costs more than memory traffic: 64 MB. Not tuned."""


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
            "tiles" takes tiles. On idle CPU cores tiles are 1.3 to 2 times faster without `is_causal`, and they keep
            the digits of small divergences (error 1e-8 instead of 1e-6 nats); the kernel holds its pace when other
            processes want the cores, where the many short operations of tiles wait for each other.

    Returns:
        KL in float32 (float64 for float64 inputs). Rows of padded queries mean nothing: leave them out by
        `torch.where`, and what stands in those queries, NaN included, has no influence on any gradient.

    Raises:
        ValueError: heads that key heads do not divide, or a mask that does not broadcast to the scores.
    """
    batch, heads, queries, _ = query_student.shape
    keys = key_student.shape[2]
    for key in (key_teacher, key_student):
        if heads % key.shape[1]:
            raise ValueError(f"{key.shape[1]} key heads do not divide {heads} heads.")
    if key_teacher.shape[1] != key_student.shape[1]:
        key_teacher, key_student = (
            key.repeat_interleave(heads // key.shape[1], dim=1) for key in (key_teacher, key_student)
        )
    shape = (batch, heads, queries, keys)
    mask_teacher = _as_scores_shape(attention_mask, shape)
    mask_teacher = None if mask_teacher is None else mask_teacher.detach()
    own_mask = attention_mask_student is not None
    mask_student = _as_scores_shape(attention_mask_student, shape) if own_mask else mask_teacher
    tensors = (query_teacher.detach(), key_teacher.detach(), query_student, key_student)
    scales = tuple(query.shape[-1] ** -0.5 if scale is None else scale for query in (query_teacher, query_student))
    if method == "kernel":
        refusal = kernel_refusal(query_student.device, softcap=softcap, own_student_mask=own_mask)
        if refusal is None:
            return kernel_kl(*tensors, mask_teacher, is_causal, (scales[0], scales[1]))
        _tell_once(refusal)
    settings = _Settings(is_causal=is_causal, scales=(scales[0], scales[1]), softcap=softcap)
    with torch.autocast(query_student.device.type, enabled=False):
        kl: Tensor = _TiledKL.apply(*tensors, mask_teacher, mask_student, settings)
    return kl


@cache
def _tell_once(refusal: str) -> None:
    _logger.info("Attention KL goes by tiles instead of a fused kernel: %s.", refusal)


def _as_scores_shape(mask: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
    """The mask with 4 axes, each 1 or that of the scores; axes that were only expanded are 1 again."""
    if mask is None:
        return None
    if mask.dim() > 4 or any(
        got not in (1, wanted) for got, wanted in zip(mask.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(f"A mask of shape {tuple(mask.shape)} does not broadcast to scores of shape {shape}.")
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.requires_grad:
        return mask
    for axis in range(4):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask


@dataclass(frozen=True)
class _Settings:
    is_causal: bool
    scales: tuple[float, float]
    """Teacher's and student's."""
    softcap: float | None


class _Tile(NamedTuple):
    """A part of the scores: slices of batch, key heads and queries, and how many of the first keys it sees."""

    batch: slice
    heads: slice
    rows: slice
    keys: int

    def of_queries(self, tensor: Tensor) -> Tensor:
        """Its part of a tensor (batch, key_heads, group, queries, ...)."""
        return tensor[self.batch, self.heads, :, self.rows]

    def of_keys(self, tensor: Tensor) -> Tensor:
        """Its part of a tensor (batch, key_heads, keys, head_dim)."""
        return tensor[self.batch, self.heads, : self.keys]

    def of_mask(self, mask: Tensor) -> Tensor:
        """Its part of a mask (#batch, #key_heads, #group, #queries, #keys)."""
        parts = (self.batch, self.heads, slice(None), self.rows, slice(0, self.keys))
        return mask[tuple(slice(None) if size == 1 else part for size, part in zip(mask.shape, parts, strict=True))]


def _tiles(query: Tensor, keys: int, is_causal: bool) -> Iterator[_Tile]:
    """Tiles that cover the scores of a grouped query, each of about as many elements as the cache likes."""
    batch, key_heads, group, queries, _ = query.shape
    elements = _CPU_TILE_ELEMENTS if query.device.type == "cpu" else _GPU_TILE_ELEMENTS
    least = max(1, _LEAST_ROWS // group)
    rows = max(least, elements // (group * keys))
    if is_causal:  # short tiles leave out more of the keys that lie ahead of all their queries
        rows = min(rows, max(least, queries // 4))
    rows = min(rows, queries)
    heads = min(key_heads, max(1, elements // (group * keys * rows)))
    texts = min(batch, max(1, elements // (group * keys * rows * heads)))
    for text in range(0, batch, texts):
        for head in range(0, key_heads, heads):
            for row in range(0, queries, rows):
                end = min(row + rows, queries)
                yield _Tile(
                    batch=slice(text, min(text + texts, batch)),
                    heads=slice(head, min(head + heads, key_heads)),
                    rows=slice(row, end),
                    keys=min(end, keys) if is_causal else keys,
                )


class _Scores:
    """One side's scores, which exist a tile at a time."""

    def __init__(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, settings: _Settings, dtype: torch.dtype
    ) -> None:
        key_heads = key.shape[1]
        self.query = query.unflatten(1, (key_heads, -1))
        self.key = key.to(dtype).contiguous()
        self.mask = None if mask is None else _grouped_mask(mask, key_heads)
        if self.mask is not None and self.mask.shape[3] == 1:  # of padding only: small enough to be made once
            self.mask = _additive(self.mask, dtype)
        self.scale = scale
        self.is_causal = settings.is_causal
        self.softcap = settings.softcap
        self.dtype = dtype

    def scaled_query(self, tile: _Tile, counts: Tensor | None = None) -> Tensor:
        """(batch, key_heads, group · rows, head_dim): a group's heads share a key, so they are rows of one product.

        Zeros where `counts` (batch, key_heads, group, queries, 1) is False.
        """
        query = tile.of_queries(self.query).to(self.dtype) * self.scale
        if counts is not None:
            query.masked_fill_(~tile.of_queries(counts), 0)
        return query.flatten(2, 3)

    def of(self, tile: _Tile, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores (batch, key_heads, group, rows, keys), and d score / d (query · key · scale) where that is not 1."""
        scores = query @ tile.of_keys(self.key).mT
        scores = scores.unflatten(2, (self.query.shape[2], -1))
        slope = None
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_()
            slope = 1 - scores.square()
            scores.mul_(self.softcap)
        if self.mask is not None:
            scores.add_(_additive(tile.of_mask(self.mask), self.dtype))
        if self.is_causal and tile.rows.start < tile.keys:
            ahead = scores[..., tile.rows.start :]
            hidden = torch.full(ahead.shape[-2:], HIDDEN, dtype=self.dtype, device=ahead.device)
            ahead.add_(hidden.triu_(1))
        return scores, slope


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Added to scores, which takes half the time of filling them by a boolean mask."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, HIDDEN)
    return mask.to(dtype).clamp_min(HIDDEN)


def _sides(
    query_teacher: Tensor,
    query_student: Tensor,
    key_teacher: Tensor,
    key_student: Tensor,
    mask_teacher: Tensor | None,
    mask_student: Tensor | None,
    settings: _Settings,
) -> tuple[_Scores, _Scores]:
    dtype = torch.promote_types(torch.promote_types(query_teacher.dtype, query_student.dtype), torch.float32)
    return (
        _Scores(query_teacher, key_teacher, mask_teacher, settings.scales[0], settings, dtype),
        _Scores(query_student, key_student, mask_student, settings.scales[1], settings, dtype),
    )


def _grouped_mask(mask: Tensor, key_heads: int) -> Tensor:
    return mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (key_heads, -1))


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
        settings: _Settings,
    ) -> Tensor:
        teacher, student = _sides(
            query_teacher, query_student, key_teacher, key_student, mask_teacher, mask_student, settings
        )
        kl = student.key.new_empty(student.query.shape[:-1])
        slant = student.key.new_empty(student.query.shape) if ctx.needs_input_grad[2] else None
        for tile in _tiles(student.query, key_student.shape[2], settings.is_causal):
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
            teacher, student = _sides(
                query_teacher, query_student, key_teacher, key_student, mask_teacher, mask_student, settings
            )
            grad_key = torch.zeros_like(student.key)
            if student.mask is not None and ctx.needs_input_grad[5]:
                grad_mask = torch.zeros_like(student.mask, dtype=student.dtype)
            weight, counts = (tensor.unflatten(1, student.query.shape[1:3]) for tensor in (weight, counts))
            with torch.autocast(grad_kl.device.type, enabled=False):
                for tile in _tiles(student.query, key_student.shape[2], settings.is_causal):
                    _add_tile_gradients(tile, teacher, student, weight, counts, grad_key, grad_mask)
            grad_key = grad_key.to(key_student.dtype)
        if grad_mask is not None:
            grad_mask = grad_mask.flatten(1, 2).to(mask_student.dtype)
        return None, None, grad_query, grad_key, None, grad_mask, None


def _add_tile_gradients(
    tile: _Tile,
    teacher: _Scores,
    student: _Scores,
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
