"""Solver `scaled_svd`: SVD of the weight with its input channels scaled by how large their inputs are."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from makd.solvers import Decomposition, Solver, decompose_svd


def decompose(weight: Tensor, inputs: Tensor, gradients: Sequence[Tensor], rank: int | None) -> Decomposition:
    """W = (W S) S⁻¹, with S the root mean square of each input channel."""
    size = inputs.diagonal().clamp(min=1e-12).sqrt().to(weight.dtype)
    found = decompose_svd(weight * size, rank)
    return replace(found, right=found.right / size)


SCALED_SVD = Solver("SVD of the weight, channels scaled by their inputs", inputs=True, decompose=decompose)
