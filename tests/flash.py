"""An attention that is told what FlashAttention is told, on the CPU: padding and a window, but no mask of scores."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FLASH = "flash_of_the_tests"


def _attend(module, query, key, value, attention_mask, *, sliding_window=None, is_causal=None, **settings):
    assert attention_mask is None or attention_mask.dim() == 2
    queries, keys = (torch.arange(one.shape[-2]) for one in (query, key))
    away = queries[:, None] - keys
    seen = away.abs() < (sliding_window or len(keys))
    seen = seen & (away >= 0) if is_causal or (is_causal is None and module.is_causal) else seen
    seen = seen[None, None] if attention_mask is None else seen & attention_mask[:, None, None].bool()
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, seen, is_causal=False, **settings)


AttentionInterface.register(FLASH, _attend)
AttentionMaskInterface.register(FLASH, flash_attention_mask)


def set_flash(model):
    """Let `model` attend so; by transformers' own method it would look for a package of that name."""
    model.config._attn_implementation = FLASH
    return model
