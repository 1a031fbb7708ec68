"""Solver `whitened`: the best factors for the inputs that calibration saw."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from makd.errors import NumericsError
from makd.solvers.eigen import eigh
from makd.solvers.factors import Decomposition
from makd.solvers.svd import principal_outputs, widened
from makd.weights.finite import is_factor, is_finite

RIDGE = 1e-6
"""What is added to the diagonal of a Gram matrix that is not positive definite, relative to its mean eigenvalue;
ten times as much until it is. Small enough to leave the seen directions alone, large enough that unseen ones are
ordered by the weight."""
FLOOR = 1e-10
"""A Gram matrix whose smallest eigenvalue is below this share of the mean one counts as not positive definite."""

ALL_ZERO = "were zero in all of the calibration text"
"""Of what nothing is known."""


def decompose_whitened(
    weight: Float[Tensor, "out inp"], gram: Float[Tensor, "inp inp"], rank: int | None = None
) -> Decomposition:
    """Terms of W ordered by what they do to the outputs over the inputs with second moments G = `gram`.

    The squared error is tr((W - BA) G (W - BA)ᵀ), the mean squared error of the outputs. With G = R Rᵀ it is
    ‖(W - BA) R‖², so the best BA is the truncated SVD of W R = U S Vᵀ, times R⁻¹ (SVD-LLM, Wang et al. 2024; DRONE,
    Chen et al. 2021). That is U_r U_rᵀ W: the projection of the outputs on their r principal directions, which needs no
    inverse.

    A Gram matrix that is not positive definite (fewer tokens than dimensions, inputs that are always zero) gets
    `RIDGE` on its diagonal, and the decomposition says so. The squared error is then that under G + λI, a little above
    the one under G. Under G itself the factors are still no worse than those of a plain SVD: they are the best under
    G + λI, so err_G + λ‖ΔW‖² is no larger than the SVD's, and the SVD's ‖ΔW‖² is the smallest there is.

    Args:
        weight: (out, in).
        gram: second moments of the inputs.
        rank: how many terms are asked for; None is all.

    Raises:
        NumericsError: `weight` or `gram` holds NaN or infinity.
    """
    matrix = widened(weight)
    root, fallback = square_root(gram)
    found = principal_outputs(matrix, matrix @ root, rank)
    return found.terms(found.left, found.left.T @ matrix, weight.dtype, fallback)


def square_root(
    gram: Float[Tensor, "size size"], what: str = "its inputs", added: float = 0.0
) -> tuple[Float[Tensor, "size size"], str | None]:
    """R with R Rᵀ = `gram` + `added` · its mean eigenvalue · 1, and what was done to make that positive definite.

    R is float64 and lower triangular; the other is None if nothing had to be done.

    R is Cholesky's, in one matrix of memory beside `gram`: the moments may be the largest thing there is.

    Args:
        gram: second moments; not changed.
        what: whose they are, for the text.
        added: at least 0.

    Raises:
        NumericsError: `gram` holds NaN or infinity.
    """
    if not is_finite(gram):
        raise NumericsError(f"The second moments of {what} hold NaN or infinity.")
    gram = gram.to(torch.float64)
    ridge_of_all = added * float(gram.diagonal().mean())
    mean = float((gram.diagonal() + ridge_of_all).mean())
    if mean <= 0:
        return torch.eye(len(gram)).to(gram), f"{what} {ALL_ZERO}; all directions of them count alike"
    root = torch.empty_like(gram).T
    if factorize_(root.copy_(gram), (ridge_of_all, -FLOOR * mean)):
        factorize_(root.copy_(gram), (ridge_of_all,))
        return root, None
    ridge = RIDGE
    while not factorize_(root.copy_(gram), (ridge_of_all, ridge * mean)):
        if ridge >= 1:
            root.copy_(gram).diagonal().add_(ridge_of_all).add_(ridge * mean)
            energies, vectors = eigh(root)
            root = torch.linalg.qr((vectors * energies.clamp(min=FLOOR * mean).sqrt()).T, mode="r").R.T
            break
        ridge *= 10  # moments of low precision have negative eigenvalues, as large as what the largest were rounded by
    return root, (
        f"the second moments of {what} are not positive definite, as behind a norm that subtracts the mean, or where "
        f"some are always zero; {ridge:g} of their mean was added to the diagonal"
    )


def factorize_(matrix: Float[Tensor, "size size"], shifts: Sequence[float]) -> bool:
    """Whether `matrix`, with the `shifts` on its diagonal, has a Cholesky factor, which then takes its place.

    Without other memory where columns of `matrix` are contiguous: `torch.empty_like(gram).T`.
    """
    for shift in shifts:
        matrix.diagonal().add_(shift)
    failed_at = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, failed_at))
    return is_factor(matrix, failed_at)
