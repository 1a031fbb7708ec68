"""Station 3: whether numbers can be worked with at all, asked of tensors that may be the largest thing in memory."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum is many times cheaper than a look at each element, and one NaN or infinity is enough to show in it. It may
    also overflow where elements are only large, and then each is looked at.
    """
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def is_factor(factor: Tensor, failed_at: Tensor) -> bool:
    """Whether `factor` is what Cholesky's decomposition was to give: `failed_at` is 0, and no pivot is NaN.

    CUDA's may leave NaN at a pivot below zero and call that a success.
    """
    return int(failed_at) == 0 and is_finite(factor.diagonal())
