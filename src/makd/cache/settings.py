"""Station 6: the settings of a teacher cache."""

from dataclasses import dataclass
from typing import Literal

from makd.errors import SettingError
from makd.kinds import checked


@dataclass(frozen=True, kw_only=True)
@checked("cache")
class CacheConfig:
    """How a teacher's outputs on the training rows are kept on disk. What is kept follows from the recipe's plan."""

    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    """How numbers are stored. int8: states only, with a factor for each token (and head); the rest is float16 then."""
    top_k: int = 64
    """Of predictions over a vocabulary, how many of the likeliest tokens are told apart; the rest is one number."""
    batch_size: int = 16
    """Rows of the teacher's forward."""
    shard_megabytes: int = 256
    """About the size of a file. A build that was stopped goes on at the next one."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16", "bfloat16", "int8"):
            raise SettingError(f"cache.dtype is float32, float16, bfloat16 or int8; got {self.dtype!r}.")
        for name in ("top_k", "batch_size", "shard_megabytes"):
            if getattr(self, name) < 1:
                raise SettingError(f"cache.{name} is at least 1; got {getattr(self, name)}.")
