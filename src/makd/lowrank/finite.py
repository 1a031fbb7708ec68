"""Station 3: whether numbers can be worked with at all, asked of tensors that may be the largest thing in memory."""

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum is many times cheaper than a look at each element, and one NaN or infinity is enough to show in it. It may
    also overflow where elements are only large, and then each is looked at.
    """
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())
