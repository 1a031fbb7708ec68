"""Station 6: from a teacher's numbers to those on disk, and back.

float16 and bfloat16 round. int8 keeps round(127 · x / s) and s, the largest |x| along the last axis: of a token's
channels, or of one head's.
"""

import torch
from torch import Tensor

from makd.errors import NumericsError, SettingError

SCALE = ".scale"
"""Ending of the name of what an int8 tensor is multiplied by."""
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.float16}
_LEAST_LOG_PROBABILITY = -1e4
"""Stands for less in any dtype: its probability is 0 in float64."""


def encode(name: str, values: Tensor, dtype: str) -> dict[str, Tensor]:
    """What is stored of `values`, by name: itself, and with int8 the factors.

    Raises:
        NumericsError: the teacher gives NaN or infinity.
        SettingError: a number is too large for `dtype`.
    """
    if not bool(torch.isfinite(values).all()):
        raise NumericsError(
            f"The teacher gives NaN or infinity in {name}. Check its weights; float16 teachers overflow often, "
            "bfloat16 ones do not."
        )
    if dtype == "int8":
        scale = values.abs().amax(-1, keepdim=True).float() / 127
        steps = torch.where(scale > 0, values / scale, 0).round()
        return {name: steps.to(torch.int8), name + SCALE: scale.squeeze(-1)}
    return {name: _round(name, values, dtype)}


def encode_exactly(name: str, values: Tensor, dtype: str) -> dict[str, Tensor]:
    """`encode`, in float16 for int8: of embeddings, logits and log-probabilities, for which that is too coarse."""
    return encode(name, values, "float16" if dtype == "int8" else dtype)


def encode_log_probabilities(name: str, values: Tensor, dtype: str) -> dict[str, Tensor]:
    """`encode_exactly` of log-probabilities, of which minus infinity is made finite."""
    return encode_exactly(name, values.clamp_min(_LEAST_LOG_PROBABILITY), dtype)


def encode_tokens(name: str, tokens: Tensor, vocabulary: int) -> dict[str, Tensor]:
    """Token ids in 2 bytes where they fit, else 4."""
    return {name: tokens.to(torch.uint16 if vocabulary <= 2**16 else torch.int32)}


def decode_into(room: Tensor, stored: Tensor, scale: Tensor | None) -> None:
    """Write stored values into `room`, of the same shape, in its dtype."""
    room.copy_(stored)
    if scale is not None:
        room.mul_(scale.unsqueeze(-1))


def _round(name: str, values: Tensor, dtype: str) -> Tensor:
    rounded = values.to(_DTYPES[dtype])
    if not bool(torch.isfinite(rounded).all()):
        raise SettingError(
            f"{name} has numbers up to {values.abs().max():.3g}, too large for cache.dtype {dtype}. "
            "Take bfloat16 or int8."
        )
    return rounded
