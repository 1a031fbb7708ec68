"""Station 3: second moments of what flows into a linear, streamed: memory does not grow with the amount of text."""

import torch
from jaxtyping import Float
from torch import Tensor

from makd.errors import NumericsError


class InputMoments:
    """Sum of x xᵀ, sum of x and number of rows x seen so far.

    Each update's product is taken in the inputs' own precision, at least float32, and added up in float64. A batch has
    some thousand rows, so float32 products lose about 1e-5 relative on an entry; the sum over batches adds nothing.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.features = features
        self.rows = 0
        self._products = torch.zeros(features, features, dtype=torch.float64, device=device)
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, inputs: Float[Tensor, "rows features"]) -> None:
        """Add rows.

        Raises:
            NumericsError: they hold NaN or infinity, or so large values that their products do.
        """
        rows = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
        products = rows.T @ rows
        if not bool(torch.isfinite(products.diagonal()).all()):
            raise NumericsError(f"The activations hold NaN or infinity (or overflow when squared): {len(rows)} rows.")
        self._products += products
        self._sum += rows.sum(0, dtype=torch.float64)
        self.rows += len(rows)

    @property
    def gram(self) -> Float[Tensor, "features features"]:
        """Mean of x xᵀ, float64.

        Raises:
            ValueError: nothing was seen.
        """
        self._check()
        return self._products / self.rows

    @property
    def mean(self) -> Float[Tensor, " features"]:
        """Mean of x, float64.

        Raises:
            ValueError: nothing was seen.
        """
        self._check()
        return self._sum / self.rows

    @property
    def covariance(self) -> Float[Tensor, "features features"]:
        """Mean of (x − mean)(x − mean)ᵀ, float64.

        Raises:
            ValueError: nothing was seen.
        """
        return self.gram - torch.outer(self.mean, self.mean)

    def merge(self, other: "InputMoments") -> None:
        """Add what `other` saw.

        Raises:
            ValueError: it has another number of features.
        """
        if other.features != self.features:
            raise ValueError(f"Moments of {self.features} and of {other.features} features do not add up.")
        self._products += other._products.to(self._products.device)
        self._sum += other._sum.to(self._sum.device)
        self.rows += other.rows

    def _check(self) -> None:
        if self.rows == 0:
            raise ValueError("No rows have been seen yet.")
