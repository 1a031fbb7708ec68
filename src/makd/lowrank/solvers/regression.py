"""Solver `regression`: factors fitted to what the *student* will read and to what the teacher put out."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from makd.errors import NumericsError
from makd.lowrank.factors import Centre, Decomposition, Factors
from makd.lowrank.moments import CrossMoments
from makd.lowrank.solvers.svd import widened
from makd.lowrank.solvers.two_sided import decompose_two_sided
from makd.lowrank.solvers.whitened import decompose_whitened

RIDGE = 0.1
"""Pull towards the teacher's weight, relative to the mean variance of an input. Directions in which the calibration
text hardly varies keep the teacher's weight instead of fitting noise: what is learned from a few hundred texts has to
hold for others."""


def decompose_regression(
    weight: Float[Tensor, "out inp"],
    moments: CrossMoments,
    *,
    fit_bias: bool = True,
    gradient_gram: Float[Tensor, "out out"] | None = None,
    ridge: float = RIDGE,
) -> Decomposition:
    """Terms of the reduced-rank regression of the teacher's outputs y on the student's inputs x, bias included.

    Minimises E‖y - (B A x + b)‖² over A, B of rank r and b (Izenman, 1975):
    with centred moments C = cov(x), D = cov(y, x), the full-rank solution is W' = D C⁻¹, and the best of rank r
    projects its outputs on their r principal directions, B A = U_r U_rᵀ W' with U_r from W' C W'ᵀ; b = E[y] - B A E[x].

    W' is pulled towards the teacher's weight W: (D + λ W)(C + λ I)⁻¹, λ = `ridge` · mean variance of an input. Where
    student and teacher read the same, W' is W exactly, and the factors are those of `whitened` on centred inputs.

    The squared error is E‖y - (B A x + b)‖² a row, over the rows of `moments`, whatever the ridge; it includes what no
    rank can reach, because the student's inputs do not say it. At rank 0 it is the variance of y. With `gradient_gram`
    it is only what W' loses by its rank, weighted as in `two_sided`: the rest would need all second moments of y.

    Args:
        weight: the teacher's, (out, in). With `ridge` 0 it only gives the factors' dtype.
        moments: of the student's inputs and the teacher's outputs, over the same tokens.
        fit_bias: False for a linear without one, which shall not gain parameters: b is 0, and the moments are taken
            about the origin.
        gradient_gram: second moments of the output gradients, which then weigh the outputs' errors (`two_sided`).
        ridge: at least 0.

    Raises:
        NumericsError: an argument holds NaN or infinity, or `ridge` is 0 and the moments are not positive definite.
    """
    matrix = widened(weight)
    second = (moments.covariance if fit_bias else moments.gram).to(weight.device)
    cross = (moments.cross_covariance if fit_bias else moments.cross).to(weight.device)
    identity = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)
    penalty = ridge * _spread(moments, second)
    solved, failed = torch.linalg.solve_ex(second + penalty * identity, (cross + penalty * matrix).T)
    if int(failed) != 0 or not bool(torch.isfinite(solved).all()):
        raise NumericsError(
            "The second moments of the student's inputs cannot be inverted: they hold NaN or infinity, or are singular "
            f"(with ridge {ridge:g}). Give more calibration text, or a ridge above 0."
        )
    centre = Centre(moments.mean.to(weight.device), moments.target_mean.to(weight.device)) if fit_bias else None
    if gradient_gram is not None:
        terms = decompose_two_sided(solved.T, second, gradient_gram.to(weight.device))
        return replace(terms, dtype=weight.dtype, centre=centre)
    terms = decompose_whitened(solved.T, second)
    # E‖y - P W' x‖² = E‖y‖² - 2 tr(P W' Dᵀ) + tr(P W' C W'ᵀ), for each term's projection P = u uᵀ; D without the ridge
    agreement = ((terms.right @ cross.T) * terms.left.T).sum(1)
    energy = ((terms.right @ second) * terms.right).sum(1)
    total = moments.target_variance if fit_bias else moments.target_power
    gains = torch.cat([torch.zeros(1, dtype=energy.dtype, device=energy.device), 2 * agreement - energy])
    errors = (total - gains.cumsum(0)).clamp(min=0)
    return replace(terms, dtype=weight.dtype, squared_errors=errors, centre=centre)


def _spread(moments: CrossMoments, second: Float[Tensor, "inp inp"]) -> float:
    """Mean variance of an input, or a thousandth of its mean square where it hardly varies: less is mostly rounding."""
    power = float(moments.gram.diagonal().mean())
    return max(float(second.diagonal().mean()), 1e-3 * power) or 1.0


def fit_regression(
    weight: Float[Tensor, "out inp"],
    moments: CrossMoments,
    rank: int,
    *,
    fit_bias: bool = True,
    gradient_gram: Float[Tensor, "out out"] | None = None,
    ridge: float = RIDGE,
) -> Factors:
    """Factors of one rank from `decompose_regression`, with a bias if it was fitted."""
    terms = decompose_regression(weight, moments, fit_bias=fit_bias, gradient_gram=gradient_gram, ridge=ridge)
    return terms.factors(rank)
