"""Station 3: what a solver gives: a decomposition, from which factors of any rank are cut."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """W ~ expand @ reduce, with singular values split evenly between the two."""

    expand: Float[Tensor, "out rank"]
    reduce: Float[Tensor, "rank inp"]
    error: float
    """Predicted squared error in the solver's own norm, relative to dropping the linear altogether, in [0, 1]."""
    bias: Float[Tensor, " out"] | None = None
    """Only from solvers that refit it."""
    fallback: str | None = None
    """What was done because the statistics were not positive definite."""


@dataclass(frozen=True)
class Decomposition:
    """W as a sum of rank-1 terms, ordered by what each is worth in the solver's norm.

    Term i is left[:, i] · right[i]; leaving it out costs singular_values[i]² of squared error, and the costs add up.
    One decomposition serves rank allocation and factors of every rank.
    """

    left: Float[Tensor, "out terms"]
    right: Float[Tensor, "terms inp"]
    singular_values: Float[Tensor, " terms"]
    """In the solver's norm, descending; float64."""
    dtype: torch.dtype
    """Of the weight, and so of the factors."""
    fallback: str | None = None

    def relative_error(self, rank: int) -> float:
        """Squared error of the first `rank` terms, relative to none of them."""
        energy = self.singular_values.square()
        total = float(energy.sum())
        return float(energy[rank:].sum()) / total if total > 0 else 0.0

    def factors(self, rank: int) -> Factors:
        """The best factors of this rank, in the solver's norm.

        With W R = U S Vᵀ: B = U S^½ and A = S^½ Vᵀ R⁻¹ = S^-½ Uᵀ W, so that what flows between the factors has the
        scale of what flows out, and one learning rate fits both.

        Raises:
            ValueError: `rank` is not in 1..terms.
        """
        terms = len(self.singular_values)
        if not 1 <= rank <= terms:
            raise ValueError(f"rank is in 1..{terms}; got {rank}.")
        left, right = self.left[:, :rank], self.right[:rank]
        scale = self.singular_values[:rank]
        scale = scale.clamp(min=float(self.singular_values[0]) * 1e-12 or 1.0).sqrt()
        return Factors(
            expand=(left * scale).to(self.dtype),
            reduce=(right / scale[:, None]).to(self.dtype),
            error=self.relative_error(rank),
            fallback=self.fallback,
        )
