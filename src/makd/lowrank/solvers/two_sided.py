"""Solver `two_sided`: the best factors for the calibration's inputs and for what its outputs lead to."""

import torch
from jaxtyping import Float
from torch import Tensor

from makd.lowrank.factors import Decomposition
from makd.lowrank.solvers.svd import principal_outputs
from makd.lowrank.solvers.whitened import condition, square_root

OUTPUT_RIDGE = 1e-2
"""What is added to the diagonal of the output gradients' moments, relative to their mean eigenvalue. They come from
fewer independent draws than the inputs do (one a text and probe for headless models): small eigenvalues are noise."""


def decompose_two_sided(
    weight: Float[Tensor, "out inp"], gram: Float[Tensor, "inp inp"], gradient_gram: Float[Tensor, "out out"]
) -> Decomposition:
    """Terms of W ordered by what they do to what the model puts out.

    The error is tr(G_out (W - BA) G_in (W - BA)ᵀ): second-order, with the curvature of K-FAC (Martens & Grosse, 2015).
    With G_in = R Rᵀ and G_out = L Lᵀ it is ‖Lᵀ (W - BA) R‖², so the best BA is L⁻ᵀ (truncated SVD of Lᵀ W R) R⁻¹,
    which is L⁻ᵀ U_r U_rᵀ Lᵀ W: again a projection, of the weighted outputs.

    The singular values of all linears are in one unit, so ranks may be allocated across them.

    Raises:
        NumericsError: a moment holds NaN or infinity.
    """
    matrix = weight.detach().to(torch.float64)
    gram, fallback = condition(gram)
    mean = float(gradient_gram.diagonal().mean())
    identity = torch.eye(len(gradient_gram), dtype=torch.float64, device=gradient_gram.device)
    scale, _ = condition(gradient_gram.to(torch.float64) + (OUTPUT_RIDGE * mean or 1.0) * identity)
    lower = square_root(scale)
    weighted = lower.T @ matrix
    directions, singular_values = principal_outputs(matrix, weighted @ square_root(gram))
    left = torch.linalg.solve(lower.T, directions)
    return Decomposition(left, directions.T @ weighted, singular_values, weight.dtype, fallback)
