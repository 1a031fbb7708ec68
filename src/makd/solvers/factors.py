"""Station 3: what a solver gives: a decomposition, from which factors of any rank are cut.

The decomposition's spectrum is what rank allocation looks at, so that allocation and solving share the costly part.
"""

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
    squared_error: float = 0.0
    """The same error, absolute; each solver says in which norm. Rounding to the factors' dtype is not in it."""


@dataclass(frozen=True)
class Centre:
    """Where a regression's bias comes from: b = targets - B A inputs."""

    inputs: Float[Tensor, " inp"]
    """Mean input."""
    targets: Float[Tensor, " out"]
    """Mean of what the outputs shall be."""


@dataclass(frozen=True)
class Spectrum:
    """What each rank of a linear (or of several as one) is predicted to lose: all that choosing ranks looks at."""

    singular_values: Float[Tensor, " terms"]
    """In the solver's norm, descending; float64."""
    fallback: str | None = None
    """What was done because the statistics were not positive definite."""
    squared_errors: Float[Tensor, " ranks"] | None = None
    """Squared error at rank 0 (the linear dropped), 1, ..., terms, where it is not the energy of the terms left out."""

    def squared_error(self, rank: int) -> float:
        """Predicted squared error of the first `rank` terms in the solver's norm; rank 0 drops the linear.

        Raises:
            ValueError: `rank` is not in 0..terms.
        """
        terms = len(self.singular_values)
        if not 0 <= rank <= terms:
            raise ValueError(f"rank is in 0..{terms}; got {rank}.")
        if self.squared_errors is not None:
            return float(self.squared_errors[rank])
        return float(self.singular_values[rank:].square().sum())

    def all_squared_errors(self) -> Float[Tensor, " ranks"]:
        """Squared error at rank 0, 1, ..., float64."""
        if self.squared_errors is not None:
            return self.squared_errors.to(torch.float64)
        energies = self.singular_values.to(torch.float64).square()
        return torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)])

    def relative_error(self, rank: int) -> float:
        """`squared_error`, relative to that of none of the terms."""
        dropped = self.squared_error(0)
        return self.squared_error(rank) / dropped if dropped > 0 else 0.0

    def to_tensors(self) -> dict[str, Tensor]:
        """For a store; the fallback is noted beside."""
        errors = {} if self.squared_errors is None else {"squared_errors": self.squared_errors}
        return {"singular_values": self.singular_values, **errors}


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
    squared_errors: Float[Tensor, " ranks"] | None = None
    """Squared error at rank 0 (the linear dropped), 1, ..., terms, where it is not the energy of the terms left out."""
    centre: Centre | None = None
    """Given by solvers that refit the bias."""

    @property
    def spectrum(self) -> Spectrum:
        """What each rank is predicted to lose."""
        return Spectrum(self.singular_values, self.fallback, self.squared_errors)

    def squared_error(self, rank: int) -> float:
        """As `Spectrum.squared_error`."""
        return self.spectrum.squared_error(rank)

    def relative_error(self, rank: int) -> float:
        """As `Spectrum.relative_error`."""
        return self.spectrum.relative_error(rank)

    def factors(self, rank: int) -> Factors:
        """The best factors of this rank, in the solver's norm.

        Each term is split so that its column of B is as long as what flows between the factors is large: with the
        whitened solver's W R = U S Vᵀ, B = U S^½ and A = S^-½ Uᵀ W, and A x has variance S on the calibration text.
        One learning rate then fits both factors.

        Raises:
            ValueError: `rank` is not in 1..terms.
        """
        terms = len(self.singular_values)
        if not 1 <= rank <= terms:
            raise ValueError(f"rank is in 1..{terms}; got {rank}.")
        left, right = self.left[:, :rank], self.right[:rank]
        size = self.singular_values[:rank] / left.norm(dim=0)
        # below this a term is rounding, which a division by its own size would blow up
        scale = size.clamp(min=float(size.max()) * 1e-12 or 1.0).sqrt()
        bias = None
        if self.centre is not None:
            bias = self.centre.targets - left @ (right @ self.centre.inputs)
        return Factors(
            expand=(left * scale).to(self.dtype),
            reduce=(right / scale[:, None]).to(self.dtype),
            error=self.relative_error(rank),
            bias=None if bias is None else bias.to(self.dtype),
            fallback=self.fallback,
            squared_error=self.squared_error(rank),
        )
