"""Solvers for stacks: the matrices of all routed experts of a layer, which get factors of one rank.

The error is the sum over experts e of share_e tr(G_out (W_e - B_e A_e) G_e (W_e - B_e A_e)ᵀ): G_e are the moments of
what the expert reads, G_out those of the gradients at all experts' outputs, share_e its part of the tokens. What is not
known is the identity, and a share 1, so that each solver for linears has its kin here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from makd.solvers.eigen import eigh
from makd.solvers.factors import Spectrum
from makd.solvers.fisher import row_weights
from makd.solvers.svd import principal_outputs, widened
from makd.solvers.two_sided import OUTPUT_RIDGE, output_root
from makd.solvers.whitened import square_root

Side = Literal["", "reduce", "expand"]
"""Which factor is one for all experts: A (`reduce`), B (`expand`), or none."""


@dataclass(frozen=True)
class StackProblem:
    """What is to be decomposed."""

    weights: Sequence[Float[Tensor, "out inp"]]
    """Of each expert."""
    shares: Float[Tensor, " experts"]
    grams: Sequence[Float[Tensor, "inp inp"]] | None = None
    """G_e; None where nobody looked."""
    layer_gram: Float[Tensor, "inp inp"] | None = None
    """Moments of what all experts read."""
    gradient_gram: Float[Tensor, "out out"] | None = None
    """G_out; None where nobody looked."""
    by_rows: bool = False
    """Whether of G_out only the diagonal counts, as with `fisher`."""


@dataclass(frozen=True)
class StackFactors:
    """W_e ~ expand_e reduce_e; a side that is shared stands there once."""

    expand: Float[Tensor, "one_or_all out rank"]
    reduce: Float[Tensor, "all_or_one rank inp"]


@dataclass(frozen=True)
class StackDecomposition:
    """Factors of every rank: those of the first r terms are cut from it."""

    expand: Float[Tensor, "one_or_all out terms"]
    reduce: Float[Tensor, "all_or_one terms inp"]
    spectrum: Spectrum
    mix: Float[Tensor, "experts terms terms"] | None = None
    """With one A: the best B_e of rank r are the first r columns of `expand` times the leading (r, r) of this."""

    def factors(self, rank: int, dtype: torch.dtype) -> StackFactors:
        """The factors of this rank, both sides alike in size.

        Raises:
            ValueError: `rank` is not in 1..terms.
        """
        terms = self.reduce.shape[1]
        if not 1 <= rank <= terms:
            raise ValueError(f"rank is in 1..{terms}; got {rank}.")
        expand, reduce = self.expand[..., :rank], self.reduce[:, :rank]
        if self.mix is not None:
            expand = expand @ self.mix[:, :rank, :rank]
            # what A gives has variance 1 in each direction
            size = expand.square().sum(1).mean(0).sqrt()
            scale = size.clamp(min=float(size.max()) * 1e-12 or 1.0).sqrt()
            expand, reduce = expand / scale, reduce * scale[:, None]
        return StackFactors(expand.to(dtype), reduce.to(dtype))


def decompose_stack(problem: StackProblem, side: Side = "", rank: int | None = None) -> StackDecomposition:
    """Terms of all matrices of a stack, ordered by what they are worth together.

    Args:
        problem: weights and moments.
        side: which factor is one for all.
        rank: how many terms are asked for; None is all.

    Raises:
        NumericsError: an argument holds NaN or infinity.
    """
    sides = _Outputs.of(problem)
    if side == "reduce":
        return _one_reduce(problem, sides, rank)
    return _one_expand(problem, sides, rank) if side == "expand" else _apart(problem, sides, rank)


@dataclass(frozen=True)
class _Outputs:
    """Lower triangular L with L Lᵀ = G_out."""

    root: Tensor
    fallback: str | None

    @staticmethod
    def of(problem: StackProblem) -> "_Outputs":
        out = problem.weights[0].shape[0]
        gram = problem.gradient_gram
        if gram is None:
            return _Outputs(torch.eye(out, dtype=torch.float64, device=problem.weights[0].device), None)
        if problem.by_rows:
            rows, fallback = row_weights(gram)
            return _Outputs(torch.diag(rows), fallback)
        return _Outputs(*output_root(gram, OUTPUT_RIDGE))

    def unweighted(self, left: Tensor) -> Tensor:
        """L⁻ᵀ times these columns."""
        solved: Tensor = torch.linalg.solve_triangular(self.root.T, left, upper=True)
        return solved


def _inputs(problem: StackProblem, expert: int) -> tuple[Tensor, str | None]:
    """R with R Rᵀ = G_e."""
    if problem.grams is None:
        weight = problem.weights[0]
        return torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device), None
    return square_root(problem.grams[expert], "what an expert reads")


def _apart(problem: StackProblem, sides: _Outputs, rank: int | None) -> StackDecomposition:
    """Each expert's own truncated SVD of Lᵀ W_e R_e: as `decompose_two_sided`, one by one."""
    lefts, rights, told = [], [], [sides.fallback]
    errors: Tensor | None = None
    for expert, weight in enumerate(problem.weights):
        matrix = widened(weight)
        root, fallback = _inputs(problem, expert)
        told.append(fallback)
        weighted = sides.root.T @ matrix
        found = principal_outputs(matrix, weighted @ root, rank)
        terms = found.terms(sides.unweighted(found.left), found.left.T @ weighted, weight.dtype)
        size = terms.singular_values / terms.left.norm(dim=0)
        scale = size.clamp(min=float(size.max()) * 1e-12 or 1.0).sqrt()
        lefts.append((terms.left * scale).to(torch.float32))
        rights.append((terms.right / scale[:, None]).to(torch.float32))
        lost = terms.spectrum.all_squared_errors() * float(problem.shares[expert])
        errors = lost if errors is None else errors + lost
    assert errors is not None
    return StackDecomposition(torch.stack(lefts), torch.stack(rights), _spectrum(errors, told))


def _one_expand(problem: StackProblem, sides: _Outputs, rank: int | None) -> StackDecomposition:
    """One B: the principal directions of all weighted outputs Lᵀ W_e x together. It is the best that there is."""
    out = problem.weights[0].shape[0]
    squared = torch.zeros(out, out, dtype=torch.float64, device=problem.weights[0].device)
    told = [sides.fallback]
    for expert, weight in enumerate(problem.weights):
        root, fallback = _inputs(problem, expert)
        outputs = sides.root.T @ widened(weight) @ root
        squared += float(problem.shares[expert]) * outputs @ outputs.T
        told.append(fallback)
    energies, vectors = eigh(squared)
    energies, vectors = energies.flip(0).clamp(min=0), vectors.flip(1)
    errors = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)]).cpu()
    count = out if rank is None else min(rank, out)
    vectors = vectors[:, :count]
    left = sides.unweighted(vectors)
    reads = (energies[:count] / float(problem.shares.sum())).sqrt()
    size = (reads / left.norm(dim=0)).clamp(min=float((reads / left.norm(dim=0)).max()) * 1e-12 or 1.0)
    scale = size.sqrt()
    rights = [(vectors.T @ (sides.root.T @ widened(weight)) / scale[:, None]).float() for weight in problem.weights]
    return StackDecomposition((left * scale).float()[None], torch.stack(rights), _spectrum(errors[: count + 1], told))


def _one_reduce(problem: StackProblem, sides: _Outputs, rank: int | None) -> StackDecomposition:
    """One A: the principal right directions of all Lᵀ W_e R, R of what all experts read; then each expert's best B_e.

    With A given, the best B_e = W_e G_e Aᵀ (A G_e Aᵀ)⁻¹. With C the Cholesky factor of A G_e Aᵀ that is P_e C⁻¹, with
    P_e = W_e G_e Aᵀ C⁻ᵀ, whose columns are what each further row of A brings: errors of all ranks at once.
    """
    device, features = problem.weights[0].device, problem.weights[0].shape[1]
    identity = torch.eye(features, dtype=torch.float64, device=device)
    root, about = (identity, None) if problem.layer_gram is None else square_root(problem.layer_gram)
    squared = torch.zeros(features, features, dtype=torch.float64, device=device)
    for expert, weight in enumerate(problem.weights):
        outputs = sides.root.T @ widened(weight) @ root
        squared += float(problem.shares[expert]) * outputs.T @ outputs
    count = min(features, len(problem.weights) * problem.weights[0].shape[0], rank or features)
    _, vectors = eigh(squared)
    reduce = torch.linalg.solve_triangular(root.T, vectors.flip(1)[:, :count], upper=True).T
    parts, mixes, told = [], [], [sides.fallback, about]
    errors = torch.zeros(count + 1, dtype=torch.float64, device=device)
    for expert, weight in enumerate(problem.weights):
        matrix = widened(weight)
        gram = identity if problem.grams is None else problem.grams[expert].to(torch.float64)
        corner, fallback = square_root(reduce @ gram @ reduce.T, "what an expert makes of what it reads")
        told.append(fallback)
        inverse = torch.linalg.solve_triangular(corner, torch.eye(count).to(corner), upper=False)
        part = matrix @ gram @ reduce.T @ inverse.T
        gains = (sides.root.T @ part).square().sum(0)
        whole = (sides.root.T @ matrix @ gram * (sides.root.T @ matrix)).sum()
        lost = (whole - torch.cat([gains.new_zeros(1), gains.cumsum(0)])).clamp(min=0)
        errors += float(problem.shares[expert]) * lost
        parts.append(part.float())
        mixes.append(inverse.float())
    spectrum = _spectrum(errors.cpu(), told)
    return StackDecomposition(torch.stack(parts), reduce.float()[None], spectrum, torch.stack(mixes))


def _spectrum(errors: Tensor, told: Sequence[str | None]) -> Spectrum:
    """Of errors at rank 0, 1, ...; the singular values are what each further term takes off."""
    values = (errors[:-1] - errors[1:]).clamp(min=0).sqrt()
    texts = list(dict.fromkeys(text for text in told if text))
    fallback = texts[0] if texts else None
    return Spectrum(values.sort(descending=True).values, fallback, errors)
