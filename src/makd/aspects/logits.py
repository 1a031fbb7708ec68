"""The logits aspect of station 5: predictions over labels, or any logits that are there as a whole.

Where a vocabulary head makes them, `vocabulary` does the same without the logits of all tokens.
"""

import logging
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from makd.aspects.divergences import Divergence, forward_kl, log_probabilities

_logger = logging.getLogger(__name__)

_CHUNK_ELEMENTS = 2**21
"""Logits taken into float32 at a time: 8 MB. Smaller chunks stay in the cache and gain 5 % on idle cores, but their
many short operations wait for each other when other processes want the cores."""


def logits_divergence(
    student: Float[Tensor, "*rows student_vocabulary"],
    teacher: Float[Tensor, "*rows teacher_vocabulary"],
    mask: Bool[Tensor, "*rows"] | None = None,
    temperature: float = 1.0,
    divergence: Divergence = forward_kl,
) -> Float[Tensor, ""]:
    """A divergence of softmax(logits / τ), times τ², mean over real rows: KL(teacher ‖ student) in nats by default.

    The factor τ² keeps the gradient's size when τ changes. Source: Hinton, Vinyals & Dean, arXiv 1503.02531.

    The softmaxes are taken in float32 a chunk of rows at a time, and the student's gradient is made in the same pass
    and kept in the student's dtype. Recomputing it in the backward pass would need no less memory (the gradient is due
    there anyway, and the teacher's logits would have to live until then) and a second softmax.

    Vocabularies that differ by padding (Qwen2: 152064 and 151936) are cut to the smaller one, and said so once: padding
    the smaller with zeros would give its missing tokens probability.

    Args:
        student: logits; may hold anything where `mask` is False, and so may `teacher`. A slice such as
            `logits[:, :-1]` would be copied: leave tokens out by `mask`.
        teacher: logits; gets no gradient.
        mask: True at rows that count; None for all of them. With none that count, the loss is 0.
        temperature: τ, above 0.
        divergence: one of `DIVERGENCES`, as `divergence(name)` gives it.

    Raises:
        ValueError: `temperature` is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"A temperature is above 0; got {temperature}.")
    common = common_vocabulary(student.shape[-1], teacher.shape[-1])
    rows = None if mask is None else mask.reshape(-1).nonzero().squeeze(-1)
    flat = student[..., :common].reshape(-1, common), teacher[..., :common].reshape(-1, common)
    with torch.autocast(student.device.type, enabled=False):
        loss: Tensor = _LogitsDivergence.apply(*flat, rows, float(temperature), divergence)
    return loss


def label_divergence(
    student: Float[Tensor, "*rows labels"],
    teacher: Float[Tensor, "*rows labels"],
    mask: Bool[Tensor, "*rows"] | None = None,
    temperature: float = 1.0,
    divergence: Divergence = forward_kl,
) -> Float[Tensor, ""]:
    """A divergence of sigmoid(logits / τ), times τ², mean over the labels of real rows: each may hold or not.

    A label is a choice of two, softmax((z, 0) / τ) = (sigmoid(z / τ), 1 - sigmoid(z / τ)): see `logits_divergence`.
    """
    pairs = [torch.stack([side, torch.zeros_like(side)], dim=-1) for side in (student, teacher)]
    rows = None if mask is None else mask[..., None].expand(student.shape)
    return logits_divergence(pairs[0], pairs[1], rows, temperature, divergence)


def regression_mse(
    student: Float[Tensor, "*rows numbers"],
    teacher: Float[Tensor, "*rows numbers"],
    mask: Bool[Tensor, "*rows"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared difference of predicted numbers over those of real rows, in their unit squared."""
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return (student.to(wide) - teacher.detach().to(wide)).square().mean()


def common_vocabulary(student: int, teacher: int) -> int:
    """How many logits are compared: those that both have. A difference is said once."""
    if student != teacher:
        _warn_of_cut(student, teacher)
    return min(student, teacher)


@cache
def _warn_of_cut(student: int, teacher: int) -> None:
    _logger.warning(
        "The student has %d logits and the teacher %d; only the first %d are compared. This is right when the rest is "
        "padding of the vocabulary, and wrong when the tokenizers differ.",
        student,
        teacher,
        min(student, teacher),
    )


class _LogitsDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, rows: Tensor | None, temperature: float, divergence: Divergence
    ) -> Tensor:
        wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        count = len(student) if rows is None else len(rows)
        step = max(1, _CHUNK_ELEMENTS // student.shape[-1])
        total = student.new_zeros((), dtype=wide)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, count, step):
            chunk = slice(start, start + step) if rows is None else rows[start : start + step]
            ours = log_probabilities(student[chunk], temperature, wide)
            theirs = log_probabilities(teacher[chunk], temperature, wide)
            values, slopes = divergence(ours, theirs)
            total += values.sum()
            if gradient is not None:
                gradient[chunk] = slopes.to(gradient.dtype)
        if gradient is not None:
            # the factor comes with the loss scaling, without which float16 would round the quotients to 0
            ctx.save_for_backward(gradient)
            ctx.factor = temperature / max(1, count)
        return total * (temperature**2 / max(1, count))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * (grad_loss * ctx.factor)).to(gradient.dtype), None, None, None, None
