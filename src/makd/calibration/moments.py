"""Station 3: second moments of what flows into a linear, streamed: memory does not grow with the amount of text.

`InputMoments` serves every solver that looks at inputs, and `two_sided` also for the gradients of outputs: both are
rows of some width, and only their second moments are asked for. `CrossMoments` adds the targets that regression needs.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from makd.errors import NumericsError
from makd.weights.finite import is_finite

PRODUCT_ROWS = 8192
"""Rows whose products are added up in the inputs' own precision before they go to the float64 sum."""
SMALLEST_SQUARE = 256
"""Features from which on a symmetric product is worth its parts."""


class InputMoments:
    """Sum of x xᵀ, sum of x and number of rows x seen so far.

    Products are taken in the inputs' own precision, at least float32, `PRODUCT_ROWS` rows at a time, and added up in
    float64: half the time and a third of the memory of float64 products. That is enough: entry (i, j) is then known to
    about 1e-6 of the root of G_ii G_jj (measured in tests), in units of the features' own sizes, so a feature that is
    a thousand times larger than the rest does not blur them; the sum over batches adds nothing to it. The products of
    bfloat16 and float16 inputs are exact in float32.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.features = features
        self.rows = 0
        self._products = torch.zeros(features, features, dtype=torch.float64, device=device)
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, inputs: Float[Tensor, "rows features"]) -> None:
        """Add rows; all of them or, when it raises, none.

        Raises:
            NumericsError: they hold NaN or infinity, or so large values that their products do.
            ValueError: they have another number of features.
        """
        rows = self._widened(inputs, self.features)
        self._add(len(rows), *_own_products(rows))

    def _add(self, rows: int, products: Tensor, total: Tensor) -> None:
        self._products += products
        self._sum += total
        self.rows += rows

    @property
    def gram(self) -> Float[Tensor, "features features"]:
        """Mean of x xᵀ, float64.

        Raises:
            ValueError: nothing was seen.
        """
        self._check()
        return self._products / self.rows

    @property
    def squares(self) -> Float[Tensor, " features"]:
        """Mean of x², the diagonal of `gram`, float64.

        Raises:
            ValueError: nothing was seen.
        """
        self._check()
        return self._products.diagonal() / self.rows

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
        found = self.gram  # in place: it may be the largest thing there is
        found -= torch.outer(self.mean, self.mean)
        return found

    def merge(self, other: "InputMoments") -> None:
        """Add what `other` saw.

        Raises:
            ValueError: it is of another kind or size.
        """
        mine, theirs = self._sums(), other._sums()
        if type(other) is not type(self) or any(mine[name].shape != theirs[name].shape for name in mine):
            raise ValueError(f"{_told(self)} and {_told(other)} do not add up.")
        for name, tensor in mine.items():
            tensor += theirs[name].to(tensor.device)
        self.rows += other.rows

    def _sums(self) -> dict[str, Tensor]:
        """What adds up when moments do, but for the number of rows."""
        return {"products": self._products, "sum": self._sum}

    def _widened(self, rows: Tensor, features: int) -> Tensor:
        if rows.ndim != 2 or rows.shape[1] != features:
            raise ValueError(f"Rows of {features} features were expected; got a tensor of shape {tuple(rows.shape)}.")
        return rows.detach().to(torch.promote_types(rows.dtype, torch.float32))

    def _check(self) -> None:
        if self.rows == 0:
            raise ValueError("No rows have been seen yet.")


class CrossMoments(InputMoments):
    """Moments of inputs x, and of targets y with them: sum of y xᵀ, of y, and of the squares of y besides."""

    def __init__(self, features: int, targets: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features, device)
        self.targets = targets
        self._cross = torch.zeros(targets, features, dtype=torch.float64, device=device)
        self._target_sum = torch.zeros(targets, dtype=torch.float64, device=device)
        self._target_squares = torch.zeros(targets, dtype=torch.float64, device=device)

    def update(self, inputs: Float[Tensor, "rows features"]) -> None:
        """Not for these: inputs without their targets would bend the cross moments.

        Raises:
            TypeError: always.
        """
        raise TypeError("Cross moments are of inputs and targets: use update_pairs.")

    def update_pairs(self, inputs: Float[Tensor, "rows features"], targets: Float[Tensor, "rows targets"]) -> None:
        """Add rows of inputs and the targets that belong to them; all of them or, when it raises, none.

        Raises:
            NumericsError: they hold NaN or infinity, or so large values that their products do.
            ValueError: they have another number of features, or are not as many.
        """
        update_group([self], inputs, [targets])

    def _add_pairs(self, rows: Tensor, products: tuple[Tensor, Tensor], targets: Tensor) -> None:
        """Add rows whose own products are known."""
        wanted = self._widened(targets, self.targets)
        if len(rows) != len(wanted):
            raise ValueError(f"{len(rows)} rows of inputs cannot belong to {len(wanted)} of targets.")
        dtype = torch.promote_types(rows.dtype, wanted.dtype)
        squares = wanted.to(torch.float64).square().sum(0)
        if not bool(torch.isfinite(squares).all()):
            raise _not_finite(len(wanted))
        cross, target_sum = _products(wanted.to(dtype), rows.to(dtype))
        self._add(len(rows), *products)
        self._cross += cross
        self._target_sum += target_sum
        self._target_squares += squares

    @property
    def target_mean(self) -> Float[Tensor, " targets"]:
        """Mean of y, float64."""
        self._check()
        return self._target_sum / self.rows

    @property
    def target_power(self) -> float:
        """Mean of ‖y‖²."""
        self._check()
        return float(self._target_squares.sum()) / self.rows

    @property
    def target_variance(self) -> float:
        """Mean of ‖y - mean‖²."""
        spread = self._target_squares / self.rows - self.target_mean.square()
        return float(spread.clamp(min=0).sum())

    @property
    def cross(self) -> Float[Tensor, "targets features"]:
        """Mean of y xᵀ, float64."""
        self._check()
        return self._cross / self.rows

    @property
    def cross_covariance(self) -> Float[Tensor, "targets features"]:
        """Mean of (y - mean)(x - mean)ᵀ, float64."""
        found = self.cross
        found -= torch.outer(self.target_mean, self.mean)
        return found

    def columns_about(
        self, other: "CrossMoments | None", columns: slice
    ) -> tuple[Float[Tensor, "features columns"], Float[Tensor, "targets columns"]]:
        """Columns of the mean of (x - m)(x - m)ᵀ and of (y - t)(x - m)ᵀ; m and t are the means of `other`, or 0.

        Raises:
            ValueError: nothing was seen.
        """
        self._check()
        own, cross = self._products[:, columns] / self.rows, self._cross[:, columns] / self.rows
        if other is None:
            return own, cross
        mean, target = other.mean.to(own), other.target_mean.to(own)
        some, seen = mean[columns], self.mean[columns]
        own += torch.outer(mean - self.mean, some) - torch.outer(mean, seen)
        cross += torch.outer(target - self.target_mean, some) - torch.outer(target, seen)
        return own, cross

    def _sums(self) -> dict[str, Tensor]:
        return {
            **super()._sums(),
            "cross": self._cross,
            "target_sum": self._target_sum,
            "target_squares": self._target_squares,
        }


class PairMoments(InputMoments):
    """Moments of what a linear reads in the student, x, and in the teacher, z, over the same tokens.

    What the teacher's linear gives is W z + b, so moments of x with that follow for every linear that reads z, and cost
    in² products for all of them instead of out · in for each.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        """Nothing is seen yet; both have as many features."""
        super().__init__(features, device)
        self._pairs = torch.zeros(features, features, dtype=torch.float64, device=device)
        self._teacher_sum = torch.zeros(features, dtype=torch.float64, device=device)

    def update(self, inputs: Float[Tensor, "rows features"]) -> None:
        """Not for these.

        Raises:
            TypeError: always.
        """
        raise TypeError("Pair moments are of a student's and a teacher's inputs: use update_pairs.")

    def update_pairs(self, inputs: Float[Tensor, "rows features"], teacher: Float[Tensor, "rows features"]) -> None:
        """Add rows of the student's inputs and the teacher's; all of them or, when it raises, none.

        Raises:
            NumericsError: they hold NaN or infinity, or so large values that their products do.
            ValueError: they have another number of features, or are not as many.
        """
        rows, others = self._widened(inputs, self.features), self._widened(teacher, self.features)
        if len(rows) != len(others):
            raise ValueError(f"{len(rows)} rows of the student cannot belong to {len(others)} of the teacher.")
        pairs, teacher_sum = _products(others.to(rows.dtype), rows)
        self._add(len(rows), *_own_products(rows))
        self._pairs += pairs
        self._teacher_sum += teacher_sum

    def of_outputs(self, weight: Float[Tensor, "out features"], bias: Float[Tensor, " out"] | None) -> CrossMoments:
        """Moments of x with y = W z + b, but for the squares of y, which are NaN."""
        wide = weight.detach().to(self._pairs)
        shift = torch.zeros(len(wide)).to(wide) if bias is None else bias.detach().to(wide)
        found = CrossMoments(self.features, len(wide), wide.device)
        found.rows = self.rows
        found._products, found._sum = self._products.clone(), self._sum.clone()
        found._cross = wide @ self._pairs + torch.outer(shift, self._sum)
        found._target_sum = wide @ self._teacher_sum + self.rows * shift
        found._target_squares.fill_(torch.nan)
        return found

    def _sums(self) -> dict[str, Tensor]:
        return {**super()._sums(), "pairs": self._pairs, "teacher_sum": self._teacher_sum}


def update_group(
    moments: Sequence[CrossMoments], inputs: Float[Tensor, "rows features"], targets: Sequence[Tensor]
) -> None:
    """`update_pairs` of each with its own targets, (rows, targets), and the same inputs, whose products are made once.

    Raises:
        NumericsError, ValueError: as `update_pairs`. Moments before the one whose targets were at fault have the rows.
    """
    rows = moments[0]._widened(inputs, moments[0].features)
    products = _own_products(rows)
    for one, wanted in zip(moments, targets, strict=True):
        one._add_pairs(rows, products, wanted)


def _own_products(rows: Float[Tensor, "rows features"]) -> tuple[Tensor, Float[Tensor, " features"]]:
    """Sum of x xᵀ over the rows, and of x: as `_products` of rows and rows, by nine sixteenths of its work."""
    products = _sum_products(rows, rows, lambda one, _: _square(one))
    return products, _sum(rows)


def _square(rows: Float[Tensor, "rows features"], depth: int = 3) -> Float[Tensor, "features features"]:
    """Xᵀ X, which is symmetric: of its quarters one is another's transpose."""
    features = rows.shape[1]
    if depth == 0 or features < SMALLEST_SQUARE:
        return rows.T @ rows
    half = features // 2
    one, other = rows[:, :half], rows[:, half:]
    found = rows.new_empty(features, features)
    found[:half, :half], found[half:, half:] = _square(one, depth - 1), _square(other, depth - 1)
    torch.matmul(other.T, one, out=found[half:, :half])
    found[:half, half:] = found[half:, :half].T
    return found


def _products(
    left: Float[Tensor, "rows left"], right: Float[Tensor, "rows right"]
) -> tuple[Float[Tensor, "left right"], Float[Tensor, " left"]]:
    """Sum of left rightᵀ over the rows; and sum of left, in float64."""
    return _sum_products(left, right, lambda one, other: one.T @ other), _sum(left)


def _sum(rows: Float[Tensor, "rows features"]) -> Float[Tensor, " features"]:
    """Sum over the rows, float64, as exact as `_sum_products`; a product takes a tenth of `Tensor.sum` in float64."""
    parts = (part.new_ones(len(part)) @ part for part in rows.split(PRODUCT_ROWS))
    return torch.stack([part.to(torch.float64) for part in parts]).sum(0)


def _sum_products(left: Tensor, right: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Products of `PRODUCT_ROWS` rows, in float64 if that is more than one.

    Raises:
        NumericsError: they hold NaN or infinity.
    """
    (one, other), *more = zip(left.split(PRODUCT_ROWS), right.split(PRODUCT_ROWS), strict=True)
    products = product(one, other)
    if more:
        products = products.to(torch.float64)
    for one, other in more:
        products += product(one, other)
    if not is_finite(products):
        raise _not_finite(len(left))
    return products


def _not_finite(rows: int) -> NumericsError:
    return NumericsError(
        f"The activations hold NaN or infinity, or overflow when they are squared ({rows} rows were looked at). Use "
        "bfloat16 or float32 instead of float16, and check the model's outputs on this text."
    )


def _told(moments: InputMoments) -> str:
    sizes = f" and {moments.targets} targets" if isinstance(moments, CrossMoments) else ""
    return f"{type(moments).__name__} of {moments.features} features{sizes}"
