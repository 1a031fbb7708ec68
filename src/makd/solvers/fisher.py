"""Solver `fisher`: rows of the weight count as much as the model's outputs react to them (FWSVD)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from makd.errors import NumericsError
from makd.solvers.factors import Decomposition
from makd.solvers.svd import as_blocks, principal_outputs, stack, widened

FLOOR = 1e-3
"""Least weight of a row's error, relative to the mean: rows without any gradient still have to be written."""


def decompose_fisher(
    weight: Float[Tensor, "out inp"],
    gradient_gram: Float[Tensor, "out out"] | Sequence[Tensor],
    rank: int | None = None,
) -> Decomposition:
    """Terms of W ordered by ‖D (W - BA)‖², D² the diagonal of `gradient_gram`: the SVD of D W, times D⁻¹.

    FWSVD (Hsu et al. 2022) weighs row i by the Fisher information of its weights, the sum over j of E[(dL/dW_ij)²].
    With dL/dW = g xᵀ, and g and x taken as independent, that is E[g_i²] E‖x‖², and the second factor is the same for
    all rows. The information is the model's own (labels drawn from its predictions), as in `two_sided`, of which this
    is the case G_in = I with the diagonal of G_out alone.

    Args:
        weight: (out, in).
        gradient_gram: second moments of the output gradients; several, if `weight` is the weights of as many linears,
            one below the other.
        rank: how many terms are asked for; None is all.

    Raises:
        NumericsError: an argument holds NaN or infinity.
    """
    matrix = widened(weight)
    scales, fallback = [], None
    for block in as_blocks(gradient_gram):
        rows = block.diagonal().to(matrix)
        if not bool(torch.isfinite(rows).all()):
            raise NumericsError("The second moments of the gradients of its outputs hold NaN or infinity.")
        mean = float(rows.mean())
        if mean <= 0:
            fallback = "the gradients of its outputs were zero in all of the text; all rows count alike"
        scales.append((rows + FLOOR * mean).sqrt()[:, None] if mean > 0 else torch.ones_like(rows)[:, None])
    scale = stack(scales)
    weighted = scale * matrix
    found = principal_outputs(matrix, weighted, rank)
    return found.terms(found.left / scale, found.left.T @ weighted, weight.dtype, fallback)
