"""Station 7: the settings of teaching a student layer by layer."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from makd.errors import SettingError
from makd.kinds import checked

LEAST_BATCHES = 2
"""One to learn from, one to judge by."""


@dataclass(frozen=True, kw_only=True)
@checked("layerwise")
class LayerwiseConfig:
    """How the layers learn one after the other, each on its own."""

    steps: int = 0
    """Optimizer steps a layer, at most; 0 leaves the layers as they were factorized. 100 are a beginning."""
    learning_rate: float = 5e-4
    """Peak of the schedule. One layer bears larger steps than a whole model."""
    batch_tokens: int | None = None
    """A step takes calibration batches until they hold so many tokens. None takes one batch."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises from 0, in [0, 1)."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after that."""
    weight_decay: float = 0.0
    """AdamW's; biases and norms do not decay."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: forwards under autocast. Weights and optimizer are in float32 whatever is said here."""
    held_out_every: int = 8
    """Of so many calibration batches one is kept from the layer, to judge it by; of fewer batches, the last."""
    evaluate_every: int = 50
    """Steps between looks at the held-out batches; another one is at the end. The best weights are kept."""
    patience: int | None = 2
    """A layer is done after so many looks in a row without a better one; None goes on to the last step."""

    def __post_init__(self) -> None:
        checks = {
            "steps": (self.steps >= 0, "at least 0"),
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "batch_tokens": (self.batch_tokens is None or self.batch_tokens >= 1, "at least 1, or null"),
            "warmup": (0 <= self.warmup < 1, "a share of the steps, in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0"),
            "held_out_every": (self.held_out_every >= LEAST_BATCHES, f"at least {LEAST_BATCHES}"),
            "evaluate_every": (self.evaluate_every >= 1, "at least 1"),
            "patience": (self.patience is None or self.patience >= 1, "at least 1, or null"),
        }
        for name, (fine, allowed) in checks.items():
            if not fine:
                raise SettingError(f"layerwise.{name} is {allowed}; got {getattr(self, name)}.")

    def with_products_in(self, dtype: torch.dtype) -> "LayerwiseConfig":
        """These settings for models that run in `dtype`: in bfloat16, so do the layer's products, by autocast."""
        return replace(self, precision="bfloat16") if dtype == torch.bfloat16 else self
