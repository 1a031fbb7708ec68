"""Solver `svd`: the best factors where nothing is known of the inputs. The paper's start."""

import torch
from jaxtyping import Float
from torch import Tensor

from makd.lowrank.factors import Decomposition


def decompose_svd(weight: Float[Tensor, "out inp"]) -> Decomposition:
    """Terms of the singular value decomposition of `weight`; the error is ‖W - BA‖² (Eckart & Young, 1936).

    By the eigenvectors of the smaller of W Wᵀ and Wᵀ W in float64, which is several times faster than an SVD: squaring
    costs half of float64's digits, and the other half is more than float32 weights have.
    """
    matrix = weight.detach().to(torch.float64)
    left, singular_values = principal_outputs(matrix, matrix)
    return Decomposition(left, left.T @ matrix, singular_values, weight.dtype)


def principal_outputs(
    matrix: Float[Tensor, "out inp"], outputs: Float[Tensor, "out any"]
) -> tuple[Float[Tensor, "out terms"], Float[Tensor, " terms"]]:
    """The left singular vectors and singular values of `outputs`, as many as `matrix` has of both, descending.

    Where `outputs` has fewer directions than that, the rest of the vectors are any that complete the basis.
    """
    terms = min(matrix.shape)
    rows, columns = outputs.shape
    if rows <= columns:
        energies, vectors = torch.linalg.eigh(outputs @ outputs.T)
        left = vectors.flip(1)[:, :terms]
    else:
        energies, vectors = torch.linalg.eigh(outputs.T @ outputs)
        images = outputs @ vectors.flip(1)[:, :terms]
        # columns of `images` are orthogonal but for rounding; QR makes them a basis also where they vanish
        left, triangle = torch.linalg.qr(images)
        left = left * torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    return left, energies.flip(0)[:terms].clamp(min=0).sqrt()
