"""Pooling: how a text's vector is made of its tokens' hidden states. Pure functions of tensors."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from makd.errors import SettingError

POOLINGS = ("mean", "cls", "last", "max", "mean_sqrt_len", "weighted_mean")
"""The mean of the real tokens; the first or the last of them; the largest value of each channel; their sum over the
square root of their number; their mean with weights 1, 2, 3, … Several are joined by `+`, as in `cls+mean`: their
vectors follow each other."""
AUTO = "auto"
"""What the teacher's sentence-transformers folder says, and `mean` for a teacher without one."""


def check_pooling(pooling: str, name: str) -> None:
    """Refuse a setting `name` that is neither `AUTO` nor one or more of `POOLINGS`.

    Raises:
        SettingError: `pooling` names something else.
    """
    if pooling != AUTO and not _are_known(pooling):
        raise SettingError(
            f"{name} is {AUTO}, one of {', '.join(POOLINGS)}, or several of them joined by +, as in cls+mean; "
            f"got {pooling!r}."
        )


def pool(
    hidden: Float[Tensor, "batch tokens hidden"], mask: Bool[Tensor, "batch tokens"], how: str
) -> Float[Tensor, "batch pooled"]:
    """One vector per text, from its real tokens only, padded on either side; zeros for a text that has none.

    In float32, or float64 for float64 inputs. Several poolings make a vector of as many times the width.

    Raises:
        ValueError: `how` is not a pooling.
    """
    if not _are_known(how):
        raise ValueError(f"A pooling is one of {', '.join(POOLINGS)}, or several joined by +; got {how!r}.")
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    vectors = [_pool(wide, mask, each) for each in how.split("+")]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, -1)


def _are_known(how: str) -> bool:
    return all(each in POOLINGS for each in how.split("+"))


def _pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    if how in ("mean", "mean_sqrt_len"):
        total = torch.where(mask.unsqueeze(-1), hidden, 0).sum(1)
        count = mask.sum(1, keepdim=True).clamp_min(1)
        return total / (count if how == "mean" else count.to(hidden.dtype).sqrt())
    if how == "weighted_mean":
        weights = (mask.cumsum(1) * mask).to(hidden.dtype)
        total = (torch.where(mask.unsqueeze(-1), hidden, 0) * weights.unsqueeze(-1)).sum(1)
        return total / weights.sum(1, keepdim=True).clamp_min(1)
    if how == "max":
        chosen = hidden.masked_fill(~mask.unsqueeze(-1), float("-inf")).amax(1)
    else:
        index = mask.int().argmax(1) if how == "cls" else mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        chosen = hidden[torch.arange(len(hidden), device=hidden.device), index]
    return torch.where(mask.any(1, keepdim=True), chosen, 0)
