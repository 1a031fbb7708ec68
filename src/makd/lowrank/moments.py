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
        """Mean of (x - mean)(x - mean)ᵀ, float64.

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


class CrossMoments(InputMoments):
    """Moments of inputs x, and of targets y with them: sum of y xᵀ and sum of y besides."""

    def __init__(self, features: int, targets: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features, device)
        self._cross = torch.zeros(targets, features, dtype=torch.float64, device=device)
        self._target_sum = torch.zeros(targets, dtype=torch.float64, device=device)

    def update_pairs(self, inputs: Float[Tensor, "rows features"], targets: Float[Tensor, "rows targets"]) -> None:
        """Add rows of inputs and the targets that belong to them.

        Raises:
            NumericsError: they hold NaN or infinity.
        """
        self.update(inputs)
        rows = inputs.detach().to(torch.promote_types(inputs.dtype, torch.float32))
        wanted = targets.detach().to(rows.dtype)
        self._cross += wanted.T @ rows
        self._target_sum += wanted.sum(0, dtype=torch.float64)

    @property
    def target_mean(self) -> Float[Tensor, " targets"]:
        """Mean of y, float64."""
        self._check()
        return self._target_sum / self.rows

    @property
    def cross(self) -> Float[Tensor, "targets features"]:
        """Mean of y xᵀ, float64."""
        self._check()
        return self._cross / self.rows

    @property
    def cross_covariance(self) -> Float[Tensor, "targets features"]:
        """Mean of (y - mean)(x - mean)ᵀ, float64."""
        self._check()
        return self._cross / self.rows - torch.outer(self.target_mean, self.mean)
