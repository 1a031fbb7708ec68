"""What an attention layer was asked: its query, key and mask, post-rotary, taken where transformers hands them over.

Every architecture that goes through `ALL_ATTENTION_FUNCTIONS` calls the implementation of its config ("sdpa",
"flash_attention_2", "eager") with query, key, value and mask. While a recording is on, that entry leads through this
module, which notes the references and lets the same implementation do the work: the model stays on its fast kernel,
and attention weights are never asked for.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from makd.errors import UnsupportedModelError


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention implementation, by reference. P = softmax(query keyᵀ · scale + mask)."""

    query: Float[Tensor, "batch heads tokens head_dim"]
    key: Float[Tensor, "batch key_heads key_tokens head_dim"]
    mask: Tensor | None
    """Additive, or boolean with True where a key may be seen; broadcastable to (batch, heads, tokens, key_tokens)."""
    is_causal: bool
    """Whether the causal mask applies besides `mask`."""
    scale: float
    softcap: float | None
    """Gemma 2's bound on scores: softcap · tanh(score / softcap), before the mask."""
    position_bias: Float[Tensor, "#batch heads tokens key_tokens"] | None
    """T5's learned bias, added to the scores. The student's has its own, and gradients reach it."""
    window: int | None = None
    """Keys that are so many tokens away, or more, are not seen, besides `mask`; None sees all."""

    def to(self, device: torch.device) -> "AttentionCall":
        """This call with its tensors on `device`; itself where they are there."""
        if self.query.device == device:
            return self
        mask, bias = (None if one is None else one.to(device) for one in (self.mask, self.position_bias))
        return replace(self, query=self.query.to(device), key=self.key.to(device), mask=mask, position_bias=bias)


Recorder = Callable[[AttentionCall], None]
_recorders: dict[nn.Module, list[Recorder]] = {}
_listeners: Counter[str] = Counter()
"""Implementation -> recordings that are on: its entry leads through here from the first on, until the last is over."""
_lock = Lock()
"""The table of implementations is the process's; recordings of several threads come and go in any order."""


@contextmanager
def record_attention(recorders: dict[nn.Module, Recorder]) -> Iterator[None]:
    """Inside the block, every attention call of a module in `recorders` is handed to its recorder, then computed.

    Recordings may be nested (teacher and student), and of several threads; a module may be recorded by several.
    """
    # without a config a module does not choose an implementation, so it calls none
    implementations = {attention_implementation(module) for module in recorders if hasattr(module, "config")}
    with _lock:
        for module, recorder in recorders.items():
            _recorders[module] = [*_recorders.get(module, ()), recorder]
        for name in implementations:
            if _listeners[name] == 0:
                _install(name)
            _listeners[name] += 1
    try:
        yield
    finally:
        with _lock:
            for name in implementations:
                _listeners[name] -= 1
                if _listeners[name] == 0:
                    _remove(name)
            for module, recorder in recorders.items():
                left = [*_recorders.pop(module)]
                left.remove(recorder)
                if left:
                    _recorders[module] = left


def attention_is_noted(implementation: str) -> bool:
    """Whether calls of an implementation can be described: flex attention's masks are compiled blocks, no tensors."""
    return "flex" not in implementation


def is_flash(implementation: str) -> bool:
    """Whether an implementation is FlashAttention, which takes 16 bits alone, and windows as numbers, in no mask."""
    return bool(is_flash_attention_requested(requested_attention_implementation=implementation))


def check_float32(model: PreTrainedModel) -> None:
    """Refuse attention that cannot be run in float32, in which a student learns.

    Raises:
        UnsupportedModelError: the attention implementation of `model` is FlashAttention.
    """
    implementation = attention_implementation(model)
    if is_flash(implementation):
        raise UnsupportedModelError(
            f"{type(model).__name__} has attention implementation {implementation!r}, which takes 16 bits alone, and a "
            "student, which has its teacher's, learns in float32. Call model.set_attn_implementation('sdpa'), or load "
            "it so."
        )


def attention_implementation(module: nn.Module) -> str:
    """Name of the implementation that the module's model is set to."""
    return str(getattr(module.config, "_attn_implementation", None) or "eager")


def _install(name: str) -> None:
    had_override = name in ALL_ATTENTION_FUNCTIONS._local_mapping
    inner = ALL_ATTENTION_FUNCTIONS.get(name)

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Any:
        for recorder in _recorders.get(module, ()):
            recorder(_describe(module, name, query, key, attention_mask, kwargs))
        implementation = inner if inner is not None else _own_eager(module)
        return implementation(module, query, key, value, attention_mask, **kwargs)

    attention._makd_inner = inner if had_override else None  # type: ignore[attr-defined]
    ALL_ATTENTION_FUNCTIONS[name] = attention


def _remove(name: str) -> None:
    override = ALL_ATTENTION_FUNCTIONS._local_mapping[name]._makd_inner
    if override is None:
        del ALL_ATTENTION_FUNCTIONS[name]
    else:
        ALL_ATTENTION_FUNCTIONS[name] = override


def _own_eager(module: nn.Module) -> Callable[..., Any]:
    """Eager attention is not in transformers' table: each modeling file has its own, next to the module that calls."""
    own: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return own


def _describe(
    module: nn.Module, name: str, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> AttentionCall:
    scale, window = kwargs.get("scaling"), kwargs.get("sliding_window") if is_flash(name) else None
    is_causal = kwargs.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is not None and mask.dim() == 4:
        # implementations that take a mask of score shape get the causal part inside it; eager knows no other way
        is_causal, mask, window = False, mask[..., : key.shape[-2]], None
    return AttentionCall(
        query=query,
        key=key,
        mask=mask,
        is_causal=bool(is_causal) and name != "eager" and query.shape[-2] > 1,
        scale=float(scale) if scale is not None else query.shape[-1] ** -0.5,
        softcap=kwargs.get("softcap"),
        position_bias=kwargs.get("position_bias"),
        window=window if window is not None and window < key.shape[-2] else None,
    )
