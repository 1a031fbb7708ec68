"""Solver `fisher`: rows of the weight count as much as the model's outputs react to them (FWSVD)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from makd.errors import NumericsError
from makd.solvers.factors import Decomposition
from makd.solvers.svd import principal_outputs, stack, widened, with_blocks

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
    found_rows = [row_weights(block) for block, _ in with_blocks(weight, gradient_gram)]
    scale = stack([rows[:, None] for rows, _ in found_rows]).to(matrix)
    fallback = next((told for _, told in found_rows if told), None)
    weighted = scale * matrix
    found = principal_outputs(matrix, weighted, rank)
    return found.terms(found.left / scale, found.left.T @ weighted, weight.dtype, fallback)


def row_weights(gradient_gram: Float[Tensor, "out out"]) -> tuple[Float[Tensor, " out"], str | None]:
    """D, what each row's error is multiplied by, and what was done where there were no gradients.

    Raises:
        NumericsError: `gradient_gram` holds NaN or infinity on its diagonal.
    """
    rows = gradient_gram.diagonal().to(torch.float64)
    if not bool(torch.isfinite(rows).all()):
        raise NumericsError("The second moments of the gradients of its outputs hold NaN or infinity.")
    mean = float(rows.mean())
    if mean <= 0:
        return torch.ones_like(rows), "the gradients of its outputs were zero in all of the text; all rows count alike"
    return (rows + FLOOR * mean).sqrt(), None
