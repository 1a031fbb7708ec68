"""Solver `svd`: the best factors where nothing is known of the inputs. The paper's start."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from makd.errors import NumericsError
from makd.solvers.eigen import eigh, eigvalsh
from makd.solvers.factors import Decomposition
from makd.weights.finite import is_factor, is_finite

OVERSAMPLING = 8
"""Directions that subspace iteration carries beyond the rank; they converge last."""
DEGREE = 3
"""Of the Chebyshev polynomials that filter the subspace, together."""
AMPLIFICATION = 1e4
"""What rounding may grow to, relative to a direction of unit length, before a filter's polynomial is split in two."""
ROUNDING = 1e-5
"""Squared error, relative to what is kept, below which float32 cannot tell the terms apart any more."""
WORTHWHILE = 0.6
"""Share of all directions from which on all of them take no longer than some."""


def decompose_svd(weight: Float[Tensor, "out inp"], rank: int | None = None) -> Decomposition:
    """Terms of the singular value decomposition of `weight`; the squared error is ‖W - BA‖² (Eckart & Young, 1936).

    Args:
        weight: (out, in).
        rank: how many terms are asked for; fewer take less time: see `principal_outputs`. None is all.

    Raises:
        NumericsError: `weight` holds NaN or infinity.
    """
    # weights span few orders of magnitude; what the other solvers make of them spans many
    few = rank is not None and weight.dtype != torch.float64
    matrix = widened(weight, torch.float32 if few else torch.float64)
    found = principal_outputs(matrix, matrix, rank)
    if few and found.rest < ROUNDING * float(found.singular_values.square().sum()):
        matrix = matrix.to(torch.float64)
        found = principal_outputs(matrix, matrix, rank)
    right = found.left.T @ matrix if found.right is None else found.right
    return found.terms(found.left, right, weight.dtype)


def with_blocks(
    matrix: Float[Tensor, "out any"], gradient_grams: Tensor | Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Moments of output gradients with the rows of `matrix` that are of those outputs, one linear after the other.

    `matrix` is of several linears, one below the other, or of one; moments are asked for when it is their turn.
    """
    first = 0
    for gram in [gradient_grams] if isinstance(gradient_grams, Tensor) else gradient_grams:
        yield gram.to(matrix.device), matrix[first : first + len(gram)]
        first += len(gram)


def stack(blocks: Sequence[Tensor]) -> Tensor:
    """The blocks one below the other; a single one as it is."""
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


def widened(weight: Float[Tensor, "out inp"], dtype: torch.dtype = torch.float64) -> Float[Tensor, "out inp"]:
    """`weight` in `dtype`.

    Raises:
        NumericsError: it holds NaN or infinity.
    """
    if not is_finite(weight):
        raise NumericsError("The weight holds NaN or infinity. Load a sound checkpoint, in a dtype wide enough for it.")
    return weight.detach().to(dtype)


@dataclass(frozen=True)
class PrincipalOutputs:
    """The directions of some outputs in which they are largest."""

    left: Float[Tensor, "out terms"]
    """Orthonormal, the largest first."""
    singular_values: Float[Tensor, " terms"]
    """Of the outputs, descending; float64."""
    rest: float = 0.0
    """Squared norm of what is in no direction of `left`, measured."""
    right: Float[Tensor, "terms any"] | None = None
    """`left` transposed times the outputs, where it came for nothing."""

    def terms(self, left: Tensor, right: Tensor, dtype: torch.dtype, fallback: str | None = None) -> Decomposition:
        """The decomposition with these columns and rows."""
        errors = None
        if self.rest > 0:
            energies = self.singular_values.square()
            tail = energies.flip(0).cumsum(0).flip(0)
            errors = self.rest + torch.cat([tail, tail.new_zeros(1)])
        return Decomposition(left, right, self.singular_values, dtype, fallback, errors)


def principal_outputs(
    matrix: Float[Tensor, "out inp"], outputs: Float[Tensor, "out any"], rank: int | None = None
) -> PrincipalOutputs:
    """The left singular vectors and singular values of `outputs`, as many as `matrix` has of both, or `rank` of them.

    All of them: by the eigenvectors of the smaller of O Oᵀ and Oᵀ O in float64. Squaring costs half of float64's 16
    digits: an error below 1e-12 of the total energy is rounding; above, it is within 1.001 of the full SVD's (measured
    in tests). Where `outputs` has fewer directions than terms are asked for, the rest complete the basis.

    `rank` of them: by `_leading`, in the dtype of `outputs`, with a fixed seed. The error is measured, and within 1.01
    of the best.
    """
    terms = min(matrix.shape)
    tall = outputs.shape[0] > outputs.shape[1]
    squared = _squared(outputs.T if tall else outputs)
    if rank is None or rank + OVERSAMPLING > WORTHWHILE * min(terms, len(squared)):
        squared = squared.to(torch.float64)
        energies, vectors = eigh(squared)
        count = min(terms, len(energies)) if rank is None else min(rank, len(energies))
        left = _to_outputs(outputs.to(torch.float64), vectors.flip(1)[:, :count], energies.flip(0)[:count])
        values = energies.flip(0)[:count].clamp(min=0).sqrt()
        rest = 0.0 if rank is None else float(energies.flip(0)[count:].clamp(min=0).sum())
        return PrincipalOutputs(left.to(outputs.dtype), values, rest)
    energies, vectors = _leading(squared, rank)
    left = _to_outputs(outputs, vectors, energies)
    right = energies.sqrt()[:, None] * vectors.T if tall and _clear(energies) else None
    total = float(squared.diagonal().sum(dtype=torch.float64))
    rest = total - float(energies.sum(dtype=torch.float64))  # of orthonormal directions: ‖O - L Lᵀ O‖² = ‖O‖² - ‖Lᵀ O‖²
    if rest < 1e-3 * total:  # the difference would be rounding
        missed: Tensor = outputs - left @ (left.T @ outputs)
        rest = float(missed.square().sum(dtype=torch.float64))
    return PrincipalOutputs(left, energies.to(torch.float64).sqrt(), rest, right)


def singular_values(outputs: Float[Tensor, "out any"]) -> Float[Tensor, " terms"]:
    """Those of `outputs`, descending, as `principal_outputs` gives them; a third of its time, and of memory."""
    squared = _squared(outputs.T if outputs.shape[0] > outputs.shape[1] else outputs).to(torch.float64)
    return eigvalsh(squared).flip(0).clamp(min=0).sqrt()


def _squared(rows: Float[Tensor, "side any"]) -> Float[Tensor, "side side"]:
    """R Rᵀ; three quarters of the products, for it is symmetric."""
    upper, lower = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    mixed = lower @ upper.T
    return torch.cat([torch.cat([upper @ upper.T, mixed.T], dim=1), torch.cat([mixed, lower @ lower.T], dim=1)])


def _leading(
    squared: Float[Tensor, "side side"], rank: int
) -> tuple[Float[Tensor, " terms"], Float[Tensor, "side terms"]]:
    """Largest eigenvalues, descending, and their vectors, of a positive semidefinite matrix, without all the others.

    Chebyshev-filtered subspace iteration (Zhou, Saad, Tiago & Chelikowsky, 2006) from a randomized start (Halko,
    Martinsson & Tropp, 2011): in the basis of Ritz vectors, a polynomial that is small on [0, smallest Ritz value]
    and grows fastest above it, then Rayleigh and Ritz once more. A polynomial of degree 3 parts what three plain
    powers hardly do: at a ratio of 1.1 of neighbouring eigenvalues by a factor of 3.3 instead of 1.3.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(squared), rank + OVERSAMPLING, generator=generator, device="cpu", dtype=torch.float32).to(
        squared
    )
    basis = _orthonormal(squared @ start)
    remaining = DEGREE
    while remaining > 0:
        images = squared @ basis
        energies, vectors = eigh(basis.T @ images)
        smallest, largest = float(energies[0]), float(energies[-1])
        if smallest <= torch.finfo(squared.dtype).eps * largest:
            break  # the basis already holds all that there is
        degree = _safe_degree(remaining, 2 * largest / smallest - 1, torch.finfo(squared.dtype).eps)
        basis = _filtered(squared, basis @ vectors, images @ vectors, smallest, degree)
        remaining -= degree
    energies, vectors = eigh(basis.T @ (squared @ basis))
    return energies.flip(0)[:rank].clamp(min=0), basis @ vectors.flip(1)[:, :rank]


def _safe_degree(wanted: int, reach: float, precision: float) -> int:
    """The largest degree, up to `wanted`, at which rounding in the direction of the largest eigenvalue stays small.

    A polynomial of degree d multiplies that direction by up to (2 · reach)ᵈ / 2.
    """
    for degree in range(wanted, 1, -1):
        if precision * (2 * reach) ** degree / 2 <= AMPLIFICATION:
            return degree
    return 1


def _filtered(
    squared: Float[Tensor, "side side"],
    basis: Float[Tensor, "side terms"],
    images: Float[Tensor, "side terms"],
    cut: float,
    degree: int,
) -> Float[Tensor, "side terms"]:
    """An orthonormal basis of the Chebyshev polynomial of `squared` that is at most 1 on [0, `cut`], of `basis`.

    Args:
        squared: positive semidefinite.
        basis: Ritz vectors.
        images: `squared` times `basis`.
        cut: above 0.
        degree: of the polynomial, at least 1.
    """
    half = cut / 2
    before, here = basis, (images - half * basis) / half
    for _ in range(degree - 1):
        before, here = here, torch.add(squared @ here, here, alpha=-half).mul_(2 / half).sub_(before)
    return _orthonormal(here)


def _orthonormal(columns: Float[Tensor, "side terms"]) -> Float[Tensor, "side terms"]:
    """A basis of what the columns span, by Cholesky (Fukaya et al., 2014): many times faster than Householder's.

    Once where their condition, lengths aside, is small, twice up to the root of the dtype's precision; Cholesky fails
    on what is worse, and Householder's takes its place.
    """
    scaled = columns / columns.norm(dim=0).clamp(min=torch.finfo(columns.dtype).tiny)
    basis: Tensor = scaled
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(basis.T @ basis)
        if not is_factor(factor, failed):
            basis, _ = torch.linalg.qr(scaled)
            return basis
        basis = torch.linalg.solve_triangular(factor.T, basis, upper=True, left=False)
        pivots = factor.diagonal()
        if float(pivots.max() / pivots.min()) < 10:
            break  # what the dtype's rounding has become is still far below what matters
    return basis


def _to_outputs(
    outputs: Float[Tensor, "out any"], vectors: Float[Tensor, "side terms"], energies: Float[Tensor, " terms"]
) -> Float[Tensor, "out terms"]:
    """Left singular vectors from eigenvectors of the smaller side; those of O Oᵀ are it already."""
    if outputs.shape[0] <= outputs.shape[1]:
        return vectors
    images = outputs @ vectors
    if _clear(energies):
        return images / energies.sqrt()
    return _orthonormal(images)  # a basis also where they vanish


def _clear(energies: Float[Tensor, " terms"]) -> bool:
    """Whether images of eigenvectors are orthogonal to within what dividing by their lengths leaves of rounding."""
    return bool(energies.min() > float(energies.max()) * torch.finfo(energies.dtype).eps ** 0.5)
