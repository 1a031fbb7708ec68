"""Solver `regression`: factors fitted to what the *student* will read and to what the teacher put out."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from makd.calibration.moments import CrossMoments
from makd.errors import NumericsError
from makd.solvers.factors import Centre, Decomposition, Factors
from makd.solvers.svd import stack, widened, with_blocks
from makd.solvers.two_sided import decompose_by_roots
from makd.solvers.whitened import decompose_whitened, factorize_, square_root

RIDGE = 0.1
"""Pull towards the teacher's weight, relative to the mean variance of an input. Directions in which the calibration
text hardly varies keep the teacher's weight instead of fitting noise: what is learned from a few hundred texts has to
hold for others."""
RIDGES = (0.01, 0.1, 1.0)
"""What `choose_ridge` chooses from."""
COLUMNS = 1024
"""Inputs whose held-out moments are looked at at a time."""


def decompose_regression(
    weight: Float[Tensor, "out inp"],
    moments: CrossMoments,
    rank: int | None = None,
    *,
    fit_bias: bool = True,
    gradient_gram: Float[Tensor, "out out"] | Sequence[Tensor] | None = None,
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
        rank: how many terms are asked for; None is all.
        fit_bias: False for a linear without one, which shall not gain parameters: b is 0, and the moments are taken
            about the origin.
        gradient_gram: second moments of the output gradients, which then weigh the outputs' errors (`two_sided`);
            several, if `weight` and the targets are those of as many linears, one after the other.
        ridge: at least 0.

    Raises:
        NumericsError: an argument holds NaN or infinity, or `ridge` is 0 and the moments are not positive definite.
    """
    solved = _solution(widened(weight), moments, fit_bias, ridge)
    centre = Centre(moments.mean.to(weight.device), moments.target_mean.to(weight.device)) if fit_bias else None
    if gradient_gram is not None:
        root = square_root(_second(moments, fit_bias, weight.device))
        terms = decompose_by_roots(solved, root, gradient_gram, rank)
        return replace(terms, dtype=weight.dtype, centre=centre)
    second, cross = _second(moments, fit_bias, weight.device), _cross(moments, fit_bias, weight.device)
    terms = decompose_whitened(solved, second, rank)
    # E‖y - P W' x‖² = E‖y‖² - 2 tr(P W' Dᵀ) + tr(P W' C W'ᵀ), for each term's projection P = u uᵀ; D without the ridge
    agreement = ((terms.right @ cross.T) * terms.left.T).sum(1)
    energy = ((terms.right @ second) * terms.right).sum(1)
    total = moments.target_variance if fit_bias else moments.target_power
    gains = torch.cat([torch.zeros(1, dtype=energy.dtype, device=energy.device), 2 * agreement - energy])
    errors = (total - gains.cumsum(0)).clamp(min=0)
    return replace(terms, dtype=weight.dtype, squared_errors=errors, centre=centre)


def choose_ridge(
    weight: Float[Tensor, "out inp"],
    moments: CrossMoments,
    held_out: CrossMoments,
    *,
    fit_bias: bool = True,
    gradient_gram: Float[Tensor, "out out"] | Sequence[Tensor] | None = None,
    ridges: Sequence[float] = RIDGES,
) -> float:
    """The ridge whose solution, fitted to `moments`, has the smallest error on tokens that it was not fitted to.

    The error of W' at full rank: E‖y - W' x‖², weighted by `gradient_gram` if it is given, with the bias of `moments`.

    Args:
        weight: the teacher's, (out, in).
        moments: of the tokens to fit.
        held_out: of other tokens.
        fit_bias: as in `decompose_regression`.
        gradient_gram: second moments of the output gradients.
        ridges: to choose from, each above 0.

    Raises:
        NumericsError: an argument holds NaN or infinity.
    """
    matrix, centre = widened(weight), moments if fit_bias else None  # the bias is that of the tokens that were fitted
    errors = []
    for ridge in ridges:
        solved = _solution(matrix, moments, fit_bias, ridge)
        errors.append(_error(solved, held_out, centre, gradient_gram))
        del solved  # of wide layers these matrices are what takes most memory
    return ridges[errors.index(min(errors))]


def _error(
    solved: Float[Tensor, "out inp"],
    held_out: CrossMoments,
    centre: CrossMoments | None,
    gradient_gram: Tensor | Sequence[Tensor] | None,
) -> float:
    """E‖y - W' x‖² about the means of `centre`, less E‖y‖², which is the same for all W'."""
    weighted = solved
    if gradient_gram is not None:
        weighted = stack([gram.to(solved.dtype) @ part for gram, part in with_blocks(solved, gradient_gram)])
    error = 0.0
    for first in range(0, held_out.features, COLUMNS):
        columns = slice(first, first + COLUMNS)
        unseen, unseen_cross = (part.to(solved) for part in held_out.columns_about(centre, columns))
        residual = (solved @ unseen).sub_(unseen_cross, alpha=2)
        error += float(residual.mul_(weighted[:, columns]).sum())
    return error


def _solution(
    matrix: Float[Tensor, "out inp"], moments: CrossMoments, fit_bias: bool, ridge: float
) -> Float[Tensor, "out inp"]:
    """W' = (D + λ W)(C + λ I)⁻¹, in one matrix of the size of C."""
    cross, second = _cross(moments, fit_bias, matrix.device), _second(moments, fit_bias, matrix.device)
    penalty = ridge * _spread(moments, second)
    factor = second.T  # whose columns are contiguous
    is_definite = factorize_(factor, (penalty,))
    # what `cholesky_solve` does, but for its copy of the factor
    halfway = torch.linalg.solve_triangular(factor, (penalty * matrix).add_(cross).T, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(factor.T, halfway, upper=True)
    if not is_definite or not bool(torch.isfinite(solved).all()):
        raise NumericsError(
            "The second moments of the student's inputs cannot be inverted: they hold NaN or infinity, or are singular "
            f"(with ridge {ridge:g}). Give more calibration text, or a ridge above 0."
        )
    return solved.T


def _second(moments: CrossMoments, fit_bias: bool, device: torch.device) -> Float[Tensor, "inp inp"]:
    """C: about the means where a bias takes those up, about the origin where there is none."""
    return (moments.covariance if fit_bias else moments.gram).to(device)


def _cross(moments: CrossMoments, fit_bias: bool, device: torch.device) -> Float[Tensor, "out inp"]:
    """D, about the same."""
    return (moments.cross_covariance if fit_bias else moments.cross).to(device)


def _spread(moments: CrossMoments, second: Float[Tensor, "inp inp"]) -> float:
    """Mean variance of an input, or a thousandth of its mean square where it hardly varies: less is mostly rounding."""
    power = float(moments.squares.mean())
    return max(float(second.diagonal().mean()), 1e-3 * power) or 1.0


def fit_regression(
    weight: Float[Tensor, "out inp"],
    moments: CrossMoments,
    rank: int,
    *,
    fit_bias: bool = True,
    gradient_gram: Float[Tensor, "out out"] | Sequence[Tensor] | None = None,
    ridge: float = RIDGE,
) -> Factors:
    """Factors of one rank from `decompose_regression`, with a bias if it was fitted."""
    terms = decompose_regression(weight, moments, rank, fit_bias=fit_bias, gradient_gram=gradient_gram, ridge=ridge)
    return terms.factors(rank)
