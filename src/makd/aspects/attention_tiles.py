"""Tiles of attention scores for the attention aspect of station 5: where no score matrix may exist as a whole.

Which part of the scores a tile is, and how either side's scores of it are made: with masks, scales, grouped heads and
soft-capping. `attention` and `attention_mean` go through them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from makd.aspects.attention_kernels import HIDDEN

_LEAST_ROWS = 64
"""Fewer rows of scores at a time make slow matrix products, whatever the cache."""
_CPU_TILE_ELEMENTS = 2**20
"""Scores of a tile: 4 MB of float32. The largest that stayed near the best in trials from 2^16 to 2^20: every operation
on a tile makes all threads meet, which takes milliseconds where other processes want the cores."""
_GPU_TILE_ELEMENTS = 2**24
"""Scores of a tile where launching a kernel costs more than memory traffic: 64 MB. Not tuned."""


@dataclass(frozen=True)
class TileSettings:
    """What both sides' scores have in common, and their scales."""

    is_causal: bool
    scales: tuple[float, float]
    """Teacher's and student's."""
    softcap: float | None


class Tile(NamedTuple):
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


def tiles(query: Tensor, keys: int, is_causal: bool, cpu_elements: int | None = None) -> Iterator[Tile]:
    """Tiles that cover the scores of a grouped query, each of about as many elements as the cache likes."""
    batch, key_heads, group, queries, _ = query.shape
    cpu_elements = _CPU_TILE_ELEMENTS if cpu_elements is None else cpu_elements
    elements = cpu_elements if query.device.type == "cpu" else _GPU_TILE_ELEMENTS
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
                yield Tile(
                    batch=slice(text, min(text + texts, batch)),
                    heads=slice(head, min(head + heads, key_heads)),
                    rows=slice(row, end),
                    keys=min(end, keys) if is_causal else keys,
                )


class Scores:
    """One side's scores, which exist a tile at a time."""

    def __init__(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, settings: TileSettings, dtype: torch.dtype
    ) -> None:
        key_heads = key.shape[1]
        self.query = query.unflatten(1, (key_heads, -1))
        self.key = key.to(dtype).contiguous()
        self.mask = None if mask is None else _grouped_mask(mask, key_heads)
        if self.mask is not None and self.mask.shape[3] == 1:  # of padding only: small enough to be made once
            self.mask = additive(self.mask, dtype)
        self.scale = scale
        self.is_causal = settings.is_causal
        self.softcap = settings.softcap
        self.dtype = dtype

    def scaled_query(self, tile: Tile, counts: Tensor | None = None) -> Tensor:
        """(batch, key_heads, group · rows, head_dim): a group's heads share a key, so they are rows of one product.

        Zeros where `counts` (batch, key_heads, group, queries, 1) is False.
        """
        query = tile.of_queries(self.query).to(self.dtype) * self.scale
        if counts is not None:
            query.masked_fill_(~tile.of_queries(counts), 0)
        return query.flatten(2, 3)

    def of(self, tile: Tile, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores (batch, key_heads, group, rows, keys), and d score / d (query · key · scale) where that is not 1."""
        scores = query @ tile.of_keys(self.key).mT
        scores = scores.unflatten(2, (self.query.shape[2], -1))
        slope = None
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_()
            slope = 1 - scores.square()
            scores.mul_(self.softcap)
        if self.mask is not None:
            scores.add_(additive(tile.of_mask(self.mask), self.dtype))
        if self.is_causal and tile.rows.start < tile.keys:
            ahead = scores[..., tile.rows.start :]
            hidden = torch.full(ahead.shape[-2:], HIDDEN, dtype=self.dtype, device=ahead.device)
            ahead.add_(hidden.triu_(1))
        return scores, slope


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Added to scores, which takes half the time of filling them by a boolean mask."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, HIDDEN)
    return mask.to(dtype).clamp_min(HIDDEN)


def both_scores(
    query_teacher: Tensor,
    query_student: Tensor,
    key_teacher: Tensor,
    key_student: Tensor,
    mask_teacher: Tensor | None,
    mask_student: Tensor | None,
    settings: TileSettings,
) -> tuple[Scores, Scores]:
    """Teacher's and student's scores, in float32 or wider."""
    dtype = torch.promote_types(torch.promote_types(query_teacher.dtype, query_student.dtype), torch.float32)
    return (
        Scores(query_teacher, key_teacher, mask_teacher, settings.scales[0], settings, dtype),
        Scores(query_student, key_student, mask_student, settings.scales[1], settings, dtype),
    )


def _grouped_mask(mask: Tensor, key_heads: int) -> Tensor:
    return mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (key_heads, -1))


def as_scores_shape(mask: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor | None:
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


class AttentionPair(NamedTuple):
    """Teacher and student, checked and fitted to each other."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    """Queries and keys: teacher's (detached) and student's, with as many key heads on both sides."""
    mask_teacher: Tensor | None
    mask_student: Tensor | None
    settings: TileSettings


def compare(
    query_teacher: Tensor,
    key_teacher: Tensor,
    query_student: Tensor,
    key_student: Tensor,
    attention_mask: Tensor | None,
    attention_mask_student: Tensor | None,
    is_causal: bool,
    scale: float | None,
    softcap: float | None,
) -> AttentionPair:
    """Arguments are those of `attention_kl`.

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
    mask_teacher = as_scores_shape(attention_mask, shape)
    mask_teacher = None if mask_teacher is None else mask_teacher.detach()
    mask_student = mask_teacher if attention_mask_student is None else as_scores_shape(attention_mask_student, shape)
    ours, theirs = (query.shape[-1] ** -0.5 if scale is None else scale for query in (query_student, query_teacher))
    return AttentionPair(
        (query_teacher.detach(), key_teacher.detach(), query_student, key_student),
        mask_teacher,
        mask_student,
        TileSettings(is_causal=is_causal, scales=(theirs, ours), softcap=softcap),
    )
