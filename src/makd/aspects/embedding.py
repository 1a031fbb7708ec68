"""The embedding aspect of station 5: what a sentence encoder is used for, one vector per text and their cosines."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from makd.aspects.hidden import LEAST_NORM
from makd.sentence_encoder import pool


@dataclass(frozen=True)
class PooledTexts:
    """A teacher's embeddings of the texts of a batch, in the place of the hidden states that they are pooled from."""

    by_pooling: Mapping[str, Float[Tensor, "batch hidden"]]


def embedding_distance(
    student_hidden: Float[Tensor, "batch tokens hidden"],
    teacher_hidden: Float[Tensor, "batch tokens hidden"],
    mask: Bool[Tensor, "batch tokens"],
    pooling: str,
) -> Float[Tensor, ""]:
    """Mean over texts of 1 - cosine between the student's and the teacher's pooled vectors; in [0, 2].

    Computed as half the squared distance of the unit vectors: the same number, but near 0 (where training ends) without
    the cancellation of 1 - cosine, and exactly 0 for equal vectors.
    """
    return vector_distance(pool(student_hidden, mask, pooling), pool(teacher_hidden, mask, pooling))


def vector_distance(
    student_embeddings: Float[Tensor, "batch hidden"], teacher_embeddings: Float[Tensor, "batch hidden"]
) -> Float[Tensor, ""]:
    """`embedding_distance` of vectors that are pooled already."""
    difference = _unit(student_embeddings) - _unit(teacher_embeddings.detach())
    return difference.square().sum(-1).mean() / 2


def similarity_mse(
    student_embeddings: Float[Tensor, "batch hidden"], teacher_embeddings: Float[Tensor, "batch teacher_hidden"]
) -> Float[Tensor, ""]:
    """Mean squared difference of the cosines between different texts of the batch; 0 for a batch of one.

    The vectors may differ in size. Source: similarity-preserving distillation (Tung & Mori, arXiv 1907.09682), on
    cosines, and without the diagonal, which is 1 on both sides.
    """
    student = _unit(student_embeddings)
    teacher = _unit(teacher_embeddings.detach())
    count = len(student)
    with torch.autocast(student.device.type, enabled=False):
        difference = student @ student.mT - teacher @ teacher.mT
    off_diagonal = ~torch.eye(count, dtype=torch.bool, device=difference.device)
    return torch.where(off_diagonal, difference, 0).square().sum() / max(1, count * (count - 1))


def _unit(vectors: Tensor) -> Tensor:
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return torch.nn.functional.normalize(vectors, dim=-1, eps=LEAST_NORM)
