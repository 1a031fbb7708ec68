"""Solver `svd`: the best factors where nothing is known of the inputs. The paper's start."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from makd.errors import NumericsError
from makd.lowrank.factors import Decomposition

OVERSAMPLING = 16
"""Directions that subspace iteration carries beyond the rank; they converge last."""
ITERATIONS = 4
"""Of subspace iteration, after the first product. Its error was at most 1.008 times the best for every matrix of
MiniLM-L6 and SmolLM2 at half of the weights (python benchmarks/decomposition.py)."""
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
    return found.terms(found.left, found.left.T @ matrix, weight.dtype)


def widened(weight: Float[Tensor, "out inp"], dtype: torch.dtype = torch.float64) -> Float[Tensor, "out inp"]:
    """`weight` in `dtype`.

    Raises:
        NumericsError: it holds NaN or infinity.
    """
    if not bool(torch.isfinite(weight).all()):
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

    `rank` of them: by subspace iteration on the same matrix (Halko, Martinsson & Tropp, 2011, algorithm 4.4, and
    Rayleigh-Ritz), in the dtype of `outputs`, with a fixed seed. The error is measured, and within 1.01 of the best.
    """
    terms = min(matrix.shape)
    squared = outputs @ outputs.T if outputs.shape[0] <= outputs.shape[1] else outputs.T @ outputs
    if rank is None or rank + OVERSAMPLING > WORTHWHILE * min(terms, len(squared)):
        squared = squared.to(torch.float64)
        energies, vectors = torch.linalg.eigh(squared)
        count = min(terms, len(energies)) if rank is None else min(rank, len(energies))
        left = _to_outputs(outputs.to(torch.float64), vectors.flip(1)[:, :count], energies.flip(0)[:count])
        values = energies.flip(0)[:count].clamp(min=0).sqrt()
        rest = 0.0 if rank is None else float(energies.flip(0)[count:].clamp(min=0).sum())
        return PrincipalOutputs(left.to(outputs.dtype), values, rest)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(squared), rank + OVERSAMPLING, generator=generator).to(squared)
    basis, _ = torch.linalg.qr(squared @ start)
    for _ in range(ITERATIONS):
        basis, _ = torch.linalg.qr(squared @ basis)
    energies, vectors = torch.linalg.eigh(basis.T @ (squared @ basis))
    energies, vectors = energies.flip(0)[:rank].clamp(min=0), basis @ vectors.flip(1)[:, :rank]
    left = _to_outputs(outputs, vectors, energies)
    missed: Tensor = outputs - left @ (left.T @ outputs)
    return PrincipalOutputs(left, energies.to(torch.float64).sqrt(), float(missed.square().sum(dtype=torch.float64)))


def _to_outputs(
    outputs: Float[Tensor, "out any"], vectors: Float[Tensor, "side terms"], energies: Float[Tensor, " terms"]
) -> Float[Tensor, "out terms"]:
    """Left singular vectors from eigenvectors of the smaller side; those of O Oᵀ are it already."""
    if outputs.shape[0] <= outputs.shape[1]:
        return vectors
    images = outputs @ vectors
    # columns of `images` are orthogonal but for rounding, which the division by a tiny length would blow up
    clear = energies > float(energies.max()) * torch.finfo(energies.dtype).eps ** 0.5
    left: Tensor
    if bool(clear.all()):
        left = images / energies.sqrt()
        return left
    left, _ = torch.linalg.qr(images)  # a basis also where they vanish
    return left
