"""Solver `regression`: factors fitted to what the *student* will read and to what the teacher put out."""

import torch
from jaxtyping import Float
from torch import Tensor

from makd.lowrank.factors import Decomposition, Factors
from makd.lowrank.moments import CrossMoments
from makd.lowrank.solvers.two_sided import decompose_two_sided
from makd.lowrank.solvers.whitened import decompose_whitened

RIDGE = 1e-3
"""Pull towards the teacher's weight, relative to the mean variance of an input. Directions in which the calibration
text hardly varies keep the teacher's weight instead of fitting noise."""


def fit_regression(
    weight: Float[Tensor, "out inp"],
    moments: CrossMoments,
    rank: int,
    *,
    fit_bias: bool = True,
    gradient_gram: Float[Tensor, "out out"] | None = None,
) -> Factors:
    """Reduced-rank regression of the teacher's outputs y on the student's inputs x, bias included.

    Minimises E‖y - (B A x + b)‖² over A, B of rank `rank` and b (Izenman, 1975):
    with centred moments C = cov(x), D = cov(y, x), the full-rank solution is W' = D C⁻¹, and the best of rank r
    projects its outputs on their r principal directions, B A = U_r U_rᵀ W' with U_r from W' C W'ᵀ; b = E[y] - B A E[x].

    W' is pulled towards the teacher's weight W: (D + λ W)(C + λ I)⁻¹. Where student and teacher read the same, W' is W
    exactly, and the factors are those of `whitened` on centred inputs.

    Args:
        weight: the teacher's, (out, in).
        moments: of the student's inputs and the teacher's outputs, over the same tokens.
        rank: of the factors.
        fit_bias: False for a linear without one, which shall not gain parameters: b is 0, and the moments are taken
            about the origin.
        gradient_gram: second moments of the output gradients, which then weigh the outputs' errors (`two_sided`).

    Returns:
        Factors, with a bias if it was fitted. `error` is the share of the outputs' variance that W' loses by its rank.
    """
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    covariance = (moments.covariance if fit_bias else moments.gram).to(weight.device)
    penalty = RIDGE * float(covariance.diagonal().mean()) or 1.0
    cross = (moments.cross_covariance if fit_bias else moments.cross).to(weight.device) + penalty * weight.to(
        torch.float64
    )
    fitted = torch.linalg.solve(covariance + penalty * identity, cross.T).T
    if gradient_gram is None:
        decomposition = decompose_whitened(fitted, covariance)
    else:
        decomposition = decompose_two_sided(fitted, covariance, gradient_gram.to(weight.device))
    terms = Decomposition(
        decomposition.left, decomposition.right, decomposition.singular_values, torch.float64, decomposition.fallback
    )
    factors = terms.factors(rank)
    bias = None
    if fit_bias:
        mean_input, mean_output = moments.mean.to(weight.device), moments.target_mean.to(weight.device)
        bias = (mean_output - factors.expand @ (factors.reduce @ mean_input)).to(weight.dtype)
    return Factors(
        factors.expand.to(weight.dtype),
        factors.reduce.to(weight.dtype),
        factors.error,
        bias,
        factors.fallback,
    )
