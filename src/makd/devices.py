"""What a device has float64 for, and what stands in its place where it has none: Apple's, and some of Intel's.

Stands below every station.
"""

import functools

import torch

from makd.errors import SettingError


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether `device` computes in float64, tried once."""
    try:
        return float(torch.ones(2, dtype=torch.float64, device=device).sum()) == 2.0
    except torch.OutOfMemoryError:  # says nothing of it
        raise
    except (TypeError, RuntimeError):
        return False


def widest_dtype(device: torch.device) -> torch.dtype:
    """What sums on `device` are made in: float64, or float32 where it has none."""
    return torch.float64 if has_float64(device) else torch.float32


def check_float64(device: torch.device) -> None:
    """Refuse a device that no model can be factorized on.

    Raises:
        SettingError: the device has no float64.
    """
    if not has_float64(device):
        raise SettingError(
            f"device {device} has no float64, which moments and factors are computed in. Take device cpu, or cuda; "
            "move a model that is on it: model.to('cpu')."
        )
