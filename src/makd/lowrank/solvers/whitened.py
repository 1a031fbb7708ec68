"""Solver `whitened`: the best factors for the inputs that calibration saw."""

import torch
from jaxtyping import Float
from torch import Tensor

from makd.errors import NumericsError
from makd.lowrank.factors import Decomposition
from makd.lowrank.solvers.svd import principal_outputs

RIDGE = 1e-6
"""What is added to the diagonal of a Gram matrix that is not positive definite, relative to its mean eigenvalue. Small
enough to leave the seen directions alone, large enough that unseen ones are ordered by the weight."""
FLOOR = 1e-10
"""A Gram matrix whose smallest eigenvalue is below this share of the mean one counts as not positive definite."""


def decompose_whitened(weight: Float[Tensor, "out inp"], gram: Float[Tensor, "inp inp"]) -> Decomposition:
    """Terms of W ordered by what they do to the outputs over the inputs with second moments G = `gram`.

    The error is tr((W - BA) G (W - BA)ᵀ), the mean squared error of the outputs. With G = R Rᵀ it is ‖(W - BA) R‖², so
    the best BA is the truncated SVD of W R = U S Vᵀ, times R⁻¹ (SVD-LLM, Wang et al. 2024; DRONE, Chen et al. 2021).
    That is U_r U_rᵀ W: the projection of the outputs on their r principal directions, which needs no inverse.

    A Gram matrix that is not positive definite (fewer tokens than dimensions, inputs that are always zero) gets
    `RIDGE` on its diagonal, and the decomposition says so.

    Raises:
        NumericsError: `gram` holds NaN or infinity.
    """
    matrix = weight.detach().to(torch.float64)
    gram, fallback = condition(gram)
    left, singular_values = principal_outputs(matrix, matrix @ square_root(gram))
    return Decomposition(left, left.T @ matrix, singular_values, weight.dtype, fallback)


def condition(gram: Float[Tensor, "size size"]) -> tuple[Float[Tensor, "size size"], str | None]:
    """`gram` in float64 and positive definite; and what was done for that, if anything.

    Raises:
        NumericsError: it holds NaN or infinity.
    """
    if not bool(torch.isfinite(gram).all()):
        raise NumericsError("The second moments of the calibration text hold NaN or infinity.")
    gram = gram.to(torch.float64)
    mean = float(gram.diagonal().mean())
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if mean <= 0:
        return identity, "its inputs were zero in all of the calibration text; plain SVD is used"
    _, info = torch.linalg.cholesky_ex(gram - FLOOR * mean * identity)
    if int(info) == 0:
        return gram, None
    return gram + RIDGE * mean * identity, (
        "the second moments of its inputs are not positive definite (fewer tokens than dimensions, or inputs that "
        f"are always zero); {RIDGE:g} of their mean was added to the diagonal. More calibration text helps"
    )


def square_root(gram: Float[Tensor, "inp inp"]) -> Float[Tensor, "inp inp"]:
    """R with R Rᵀ = gram: Cholesky's, or by eigenvectors where rounding leaves it no positive pivot."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0:
        energies, vectors = torch.linalg.eigh(gram)
        factor = vectors * energies.clamp(min=0).sqrt()
    return factor
