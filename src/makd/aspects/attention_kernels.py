"""Attention KL from fused attention kernels, which return outputs and log-sum-exps and never probabilities.

With scores S = query keyᵀ · scale + mask, and the mask shared by teacher and student, so that it cancels:

    KL_i = Σ_j P_t,ij (S_t,ij - S_s,ij) - lse_t,i + lse_s,i
         = scale_t · q_t,i · (P_t K_t)_i - scale_s · q_s,i · (P_t K_s)_i - lse_t,i + lse_s,i
    d (Σ_i w_i KL_i) / d q_s,i = w_i · scale_s · ((P_s K_s)_i - (P_t K_s)_i)
    d (Σ_i w_i KL_i) / d K_s   = scale_s · (P_sᵀ (w q_s) - P_tᵀ (w q_s))

P K is an attention output with keys in the place of values. Pᵀ X is what an attention's backward pass returns for its
values when X comes in as the gradient of its output. `makd.aspects.attention` decides when this way is taken.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

HIDDEN = -1e30
"""Score of a key that may not be seen: absorbs any other score, and unlike minus infinity never makes a NaN."""
_NOTHING_SEEN = -5e29
"""A log-sum-exp below this is of a query that may see no key."""


def kernel_refusal(device: torch.device, *, softcap: float | None, own_student_mask: bool) -> str | None:
    """Why no fused kernel can do the work; None when one can."""
    if device.type != "cpu":
        return f"no kernel is known for device {device.type!r}"
    if softcap is not None:
        return "the kernel has no softcap"
    if own_student_mask:
        return "the student's own mask does not cancel, and kernels give it no gradient"
    return None


def attend(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    mask: Float[Tensor, "#batch #heads #queries #keys"] | None,
    is_causal: bool,
    scale: float,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Attention output P · value, and the log-sum-exp of the scores.

    Args:
        query: float32 or float64, as all others.
        key: may have fewer heads than the query.
        value: may have another head_dim than the key; the kernel may not, so the narrower side is padded with zeros.
        mask: additive, in the query's dtype: the kernel reads any other float's bytes as if they were that dtype's.
        is_causal: query i sees keys 0 to i.
        scale: of the scores.
    """
    assert mask is None or mask.dtype == query.dtype
    width = max(query.shape[-1], value.shape[-1])
    output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _widened(query, width),
        _widened(key, width),
        _widened(value, width),
        0.0,
        is_causal,
        attn_mask=mask,
        scale=scale,
    )
    return output[..., : value.shape[-1]], logsumexp


def transpose_attend(
    rows: Float[Tensor, "batch heads queries row_dim"],
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    logsumexp: Float[Tensor, "batch heads queries"],
    mask: Float[Tensor, "#batch #heads #queries #keys"] | None,
    is_causal: bool,
    scale: float,
) -> Float[Tensor, "batch key_heads keys row_dim"]:
    """Pᵀ · rows, summed over the heads that share a key head; `logsumexp` is what `attend` gave."""
    width = max(query.shape[-1], rows.shape[-1])
    query, key, wide_rows = _widened(query, width), _widened(key, width), _widened(rows, width)
    # the gradients of query and key depend on value and output, that of value does not: anything of their shape will do
    _, _, grad_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        wide_rows, query, key, key, wide_rows, logsumexp, 0.0, is_causal, attn_mask=mask, scale=scale
    )
    result: Tensor = grad_value[..., : rows.shape[-1]]
    return result


def kernel_kl(
    query_teacher: Float[Tensor, "batch heads queries teacher_dim"],
    key_teacher: Float[Tensor, "batch key_heads keys teacher_dim"],
    query_student: Float[Tensor, "batch heads queries student_dim"],
    key_student: Float[Tensor, "batch key_heads keys student_dim"],
    mask: Tensor | None,
    is_causal: bool,
    scales: tuple[float, float],
) -> Float[Tensor, "batch heads queries"]:
    """What `makd.aspects.attention.attention_kl` returns, by the formulas above; `scales` are teacher's and student's.

    The value is a difference of numbers of the scores' size, so its error is theirs: about 1e-7 of a score in float32.
    """
    dtype = torch.promote_types(torch.promote_types(query_teacher.dtype, query_student.dtype), torch.float32)
    tensors = (tensor.to(dtype) for tensor in (query_teacher, key_teacher, query_student, key_student))
    with torch.autocast(query_student.device.type, enabled=False):
        kl: Tensor = _KernelKL.apply(*tensors, _additive(mask, dtype), is_causal, scales)
    return kl


class _KernelKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_teacher: Tensor,
        key_teacher: Tensor,
        query_student: Tensor,
        key_student: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scales: tuple[float, float],
    ) -> Tensor:
        # one call for both products of P_t: wider, but a second one would take the exponentials again
        both = torch.cat([key_teacher, key_student], dim=-1)
        output, lse_teacher = attend(query_teacher, key_teacher, both, mask, is_causal, scales[0])
        teacher_own, teacher_other = output.split([key_teacher.shape[-1], key_student.shape[-1]], dim=-1)
        student_own, lse_student = attend(query_student, key_student, key_student, mask, is_causal, scales[1])
        kl = scales[0] * torch.linalg.vecdot(query_teacher, teacher_own)
        kl -= scales[1] * torch.linalg.vecdot(query_student, teacher_other)
        kl += lse_student - lse_teacher
        blind = lse_teacher < _NOTHING_SEEN
        ctx.is_causal, ctx.scales = is_causal, scales
        ctx.save_for_backward(
            query_teacher, key_teacher, query_student, key_student, mask, lse_teacher, lse_student,
            scales[1] * (student_own - teacher_other), blind,
        )  # fmt: skip
        result: Tensor = kl.masked_fill_(blind, 0)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_kl: Tensor) -> tuple[Tensor | None, ...]:
        query_teacher, key_teacher, query_student, key_student, mask, lse_teacher, lse_student, slant, blind = (
            ctx.saved_tensors
        )
        weight = grad_kl.masked_fill(blind, 0).unsqueeze(-1)
        counts = weight != 0  # rows that the caller left out, padding, may hold NaN: 0 · NaN must not reach a sum
        grad_query = torch.where(counts, weight * slant, 0)
        grad_key = None
        if ctx.needs_input_grad[3]:
            query_teacher, query_student = (torch.where(counts, query, 0) for query in (query_teacher, query_student))
            # a log-sum-exp beyond all scores makes the whole row of probabilities 0
            lse_teacher, lse_student = (
                torch.where(counts.squeeze(-1), lse, -HIDDEN) for lse in (lse_teacher, lse_student)
            )
            rows = weight * query_student
            settings = (mask, ctx.is_causal)
            grad_key = transpose_attend(rows, query_student, key_student, lse_student, *settings, ctx.scales[1])
            grad_key = grad_key - transpose_attend(
                rows, query_teacher, key_teacher, lse_teacher, *settings, ctx.scales[0]
            )
            grad_key = grad_key * ctx.scales[1]
        return None, None, grad_query, grad_key, None, None, None


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(dtype).clamp_min(HIDDEN)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, HIDDEN)


def _widened(tensor: Tensor, width: int) -> Tensor:
    return tensor if tensor.shape[-1] == width else pad(tensor, (0, width - tensor.shape[-1]))
