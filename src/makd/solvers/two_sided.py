"""Solver `two_sided`: the best factors for the calibration's inputs and for what its outputs lead to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from makd.solvers.factors import Decomposition, Spectrum
from makd.solvers.svd import principal_outputs, singular_values, stack, widened, with_blocks
from makd.solvers.whitened import square_root

OUTPUT_RIDGE = 1e-2
"""What is added to the diagonal of the output gradients' moments, relative to their mean eigenvalue. They come from
fewer independent draws than the inputs do (one a text and probe for headless models): small eigenvalues are noise."""


def decompose_two_sided(
    weight: Float[Tensor, "out inp"],
    gram: Float[Tensor, "inp inp"],
    gradient_gram: Float[Tensor, "out out"] | Sequence[Tensor],
    rank: int | None = None,
    *,
    ridge: float = OUTPUT_RIDGE,
) -> Decomposition:
    """Terms of W ordered by what they do to what the model puts out.

    The error is tr(G_out (W - BA) G_in (W - BA)ᵀ): second-order, with the curvature of K-FAC (Martens & Grosse, 2015).
    With G_in = R Rᵀ and G_out = L Lᵀ it is ‖Lᵀ (W - BA) R‖², so the best BA is L⁻ᵀ (truncated SVD of Lᵀ W R) R⁻¹,
    which is L⁻ᵀ U_r U_rᵀ Lᵀ W: again a projection, of the weighted outputs.

    Linears that read the same input and shall share one A are one matrix, their weights one below the other, and the
    error is the sum of theirs: G_out is block-diagonal then, and is given as its blocks.

    The singular values of all linears are in one unit, so ranks may be allocated across them. The error is that under
    the moments with their ridges (`ridge` for G_out, `square_root`'s for those that are not positive definite), and
    under those the factors are the best.

    Args:
        weight: (out, in).
        gram: G_in, second moments of the inputs.
        gradient_gram: G_out, second moments of the output gradients; or its blocks, one for each linear.
        rank: how many terms are asked for; None is all.
        ridge: added to the diagonal of G_out, relative to its mean eigenvalue; at least 0.

    Raises:
        NumericsError: an argument holds NaN or infinity.
    """
    return decompose_by_roots(weight, square_root(gram), gradient_gram, rank, ridge=ridge)


def decompose_by_roots(
    weight: Float[Tensor, "out inp"],
    root: tuple[Float[Tensor, "inp inp"], str | None],
    gradient_gram: Float[Tensor, "out out"] | Sequence[Tensor],
    rank: int | None = None,
    *,
    ridge: float = OUTPUT_RIDGE,
) -> Decomposition:
    """`decompose_two_sided` with the `square_root` of the inputs' moments: whoever takes it can let those go."""
    matrix = widened(weight)
    sides = _Sides.of(matrix, gradient_gram, ridge)
    found = principal_outputs(matrix, sides.weighted @ root[0], rank)
    return found.terms(sides.unweighted(found.left), found.left.T @ sides.weighted, weight.dtype,
                       _told((root[1], *sides.fallbacks)))  # fmt: skip


def spectra_two_sided(
    weights: Mapping[str, Float[Tensor, "_ inp"]],
    gram: Float[Tensor, "inp inp"],
    gradient_grams: Mapping[str, Tensor],
    groups: Iterable[tuple[str, ...]] = (),
) -> dict[tuple[str, ...], Spectrum]:
    """What `decompose_two_sided` would tell of each of some linears that read the same input, and of groups as one.

    Every root is taken once, and no vectors are looked for: a fraction of the time of the decompositions.

    Args:
        weights: name -> (out, in).
        gram: second moments of their inputs.
        gradient_grams: name -> second moments of its output gradients, asked for one after the other; or none at all,
            which is `decompose_whitened`.
        groups: names of linears that are to be taken as one.

    Raises:
        NumericsError: an argument holds NaN or infinity.
    """
    root, about_inputs = square_root(gram)
    outputs, told = {}, {}
    for name, weight in weights.items():
        weighted, fallbacks = _weighted(widened(weight), gradient_grams, name)
        outputs[name] = weighted @ root
        told[name] = (about_inputs, *fallbacks)
    found = {}
    for names in (*((name,) for name in weights), *groups):
        stacked = stack([outputs[name] for name in names])
        fallback = _told(text for name in names for text in told[name])
        found[names] = Spectrum(singular_values(stacked), fallback)
    return found


def _weighted(
    matrix: Float[Tensor, "out inp"], gradient_grams: Mapping[str, Tensor], name: str
) -> tuple[Float[Tensor, "out inp"], tuple[str | None, ...]]:
    """Lᵀ W, and what was done for L; the moments and L itself are gone when the next linear's are made."""
    if not gradient_grams:
        return matrix, ()
    sides = _Sides.of(matrix, gradient_grams[name], OUTPUT_RIDGE)
    return sides.weighted, sides.fallbacks


@dataclass(frozen=True)
class _Sides:
    """A weight W and the roots L of the output gradients' moments, one for each linear that is stacked in it."""

    weighted: Float[Tensor, "out inp"]
    """Lᵀ W."""
    roots: tuple[Tensor, ...]
    """Lower triangular."""
    fallbacks: tuple[str | None, ...]

    @staticmethod
    def of(matrix: Tensor, gradient_gram: Tensor | Sequence[Tensor], ridge: float) -> "_Sides":
        weighted, roots, fallbacks = [], [], []
        for gram, part in with_blocks(matrix, gradient_gram):
            root, fallback = output_root(gram, ridge)
            weighted.append(root.T @ part)
            roots.append(root)
            fallbacks.append(fallback)
        return _Sides(stack(weighted), tuple(roots), tuple(fallbacks))

    def unweighted(self, left: Float[Tensor, "out terms"]) -> Float[Tensor, "out terms"]:
        """L⁻ᵀ times these columns."""
        parts = left.split([len(root) for root in self.roots])
        pairs = zip(self.roots, parts, strict=True)
        return stack([torch.linalg.solve_triangular(root.T, part, upper=True) for root, part in pairs])


def _told(fallbacks: Iterable[str | None]) -> str | None:
    return "; ".join(text for text in dict.fromkeys(fallbacks) if text) or None


def output_root(gradient_gram: Float[Tensor, "out out"], ridge: float) -> tuple[Float[Tensor, "out out"], str | None]:
    """L with L Lᵀ = G_out, its ridge included, and what was done to make it positive definite."""
    return square_root(gradient_gram, "the gradients of its outputs", ridge)
