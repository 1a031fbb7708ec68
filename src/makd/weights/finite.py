"""Station 3: whether numbers can be worked with at all, asked of tensors that may be the largest thing in memory."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from makd.errors import NumericsError


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum is many times cheaper than a look at each element, and one NaN or infinity is enough to show in it. It may
    also overflow where elements are only large, and then each is looked at.
    """
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def check_outputs(outputs: Tensor, whose: str) -> None:
    """Refuse outputs that are not finite: classes are taken of NaN too, and scores of those look like any other.

    Args:
        outputs: on what counts (padding may hold anything).
        whose: what they are, such as "The teacher's predictions".

    Raises:
        NumericsError: they hold NaN or infinity.
    """
    if not is_finite(outputs):
        raise NumericsError(
            f"{whose} hold NaN or infinity. float16 models overflow often: take dtype bfloat16 or float32. If the "
            "dtype is wide enough, the weights are broken."
        )


def check_measured(found: Mapping[str, float], where: str) -> None:
    """Refuse measurements of which one is not a finite number.

    Args:
        found: by name.
        where: what was measured, such as "between student and teacher".

    Raises:
        NumericsError: one is NaN or infinite; the text names it.
    """
    wrong = next((name for name, value in found.items() if not math.isfinite(value)), None)
    if wrong is not None:
        raise NumericsError(
            f"{wrong} {where} is {found[wrong]}: it cannot be measured. Look at the outputs: they are too large, or "
            "all the same."
        )


def is_factor(factor: Tensor, failed_at: Tensor) -> bool:
    """Whether `factor` is what Cholesky's decomposition was to give: `failed_at` is 0, and no pivot is NaN.

    CUDA's may leave NaN at a pivot below zero and call that a success.
    """
    return int(failed_at) == 0 and is_finite(factor.diagonal())
