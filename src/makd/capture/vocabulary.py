"""What a vocabulary head is handed, without the logits that it would make of it: the largest tensor of a step.

A `VocabularyHead` repeats what the model does from there on; `why_not_repeated` makes sure of it on a few tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import is_adapted, is_factored
from makd.anatomy.eval_mode import in_eval

_FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Where configs keep a factor of their logits (Cohere, Falcon-H1, Granite) -> its exponent."""


@dataclass(frozen=True)
class VocabularyHead:
    """From the last hidden states to logits: cap · tanh(scale · (x weightᵀ + bias) / cap)."""

    weight: Float[Tensor, "vocabulary inp"]
    bias: Float[Tensor, " vocabulary"] | None = None
    scale: float = 1.0
    softcap: float | None = None
    """Bound of the logits' size (Gemma 2); None does not bound them."""

    def finish(self, raw: Float[Tensor, "*rows vocabulary"]) -> Float[Tensor, "*rows vocabulary"]:
        """Logits from what weight and bias give."""
        scaled = raw if self.scale == 1 else raw * self.scale
        return scaled if self.softcap is None else (scaled / self.softcap).tanh() * self.softcap

    def logits(self, inputs: Float[Tensor, "*rows inp"]) -> Float[Tensor, "*rows vocabulary"]:
        """All logits at once."""
        return self.finish(nn.functional.linear(inputs, self.weight, self.bias))


@dataclass
class HeadCall:
    """One call of a vocabulary head, by reference."""

    head: VocabularyHead = field(init=False)
    """There once the forward has reached it: a sharded weight is whole only then."""
    inputs: Float[Tensor, "*rows inp"] | None = None
    """What it was handed; None until then."""

    def logits(self) -> Float[Tensor, "*rows vocabulary"]:
        """What was withheld, all at once: for metrics that ask for them."""
        assert self.inputs is not None
        return self.head.logits(self.inputs)


def has_vocabulary_head(model: PreTrainedModel) -> bool:
    """Whether a linear, dense or factored, is what makes the logits of `model`, with its weight alone: no adapter."""
    head = model.get_output_embeddings()
    return isinstance(head, nn.Linear) or (is_factored(head) and not is_adapted(head.expand))


@contextmanager
def withhold_logits(model: PreTrainedModel) -> Iterator[HeadCall]:
    """Inside the block a forward of `model` stops short of its logits: what its head was handed is in the `HeadCall`.

    The head itself is handed one token, so that whatever the model does with the logits goes on working; its output has
    the logits of that token only. Labels must not be given: there is nothing to compute their loss from.
    """
    call = HeadCall()

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        call.head = _vocabulary_head(model)
        call.inputs = _read_by(module, hidden)
        return (hidden[(slice(1),) * (hidden.dim() - 1)],)

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield call
    finally:
        handle.remove()


@torch.no_grad()
def why_not_repeated(model: PreTrainedModel) -> str | None:
    """Why the logits of `model` cannot be repeated from what its head is handed; None where they can.

    Architectures differ in what stands between head and logits; trying on six tokens is surer than a list of names.
    """
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with in_eval(model):
            logits = model(**_six_tokens(model)).get("logits")
    finally:
        handle.remove()
    if len(seen) != 1 or logits is None:
        return f"its head was called {len(seen)} times for one set of logits"
    repeated = _vocabulary_head(model).logits(_read_by(head, seen[0]))
    if repeated.shape != logits.shape or not _near(repeated, logits, logits.dtype):
        return "its logits are more than its head, a factor and a bound"
    return None


@torch.no_grad()
def label_shift_of(model: PreTrainedModel) -> int | None:
    """How many tokens further on the label is that the loss of `model` looks at at a token: causal 1, masked 0.

    None: the loss is no plain cross-entropy of the logits. It is tried on six tokens.
    """
    inputs = _six_tokens(model)
    tokens = inputs["input_ids"]
    with in_eval(model):
        # a model may make fewer logits where it has labels (ModernBERT, sparse_prediction)
        logits, loss = model(**inputs).logits, model(**inputs, labels=tokens).loss
    for shift in (0, 1):
        kept, labels = logits[0, : logits.shape[1] - shift].float(), tokens[0, shift:]
        if loss is not None and _near(nn.functional.cross_entropy(kept, labels), loss.float(), logits.dtype):
            return shift
    return None


def _six_tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a forward is tried on."""
    head = model.get_output_embeddings()
    # where the head is: the model's first weights may be on disk
    tokens = torch.arange(1, 7, device=head.weight.device).remainder(head.out_features)[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return inputs | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})


def _read_by(linear: Any, hidden: Tensor) -> Tensor:
    """What the weight of a `VocabularyHead` is applied to: of a factored head, what its first factor makes.

    It is brought to that weight: in a model that is spread over devices, what stands before a tied head is elsewhere.
    """
    read: Tensor = linear.reduce(hidden) if is_factored(linear) else hidden
    return read.to(linear.weight.device)


def _vocabulary_head(model: PreTrainedModel) -> VocabularyHead:
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0
    for name, exponent in _FACTORS.items():
        factor = getattr(config, name, None)
        scale *= 1.0 if factor is None else float(factor) ** exponent
    bias, added = linear.bias, getattr(model, "final_logits_bias", None)
    if isinstance(added, Tensor):  # BART and its kin add a buffer to the logits
        bias = added[0] if bias is None else bias + added[0]
    softcap = getattr(config, "final_logit_softcapping", None)
    return VocabularyHead(linear.weight, bias, scale, None if softcap is None else float(softcap))


def _near(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors differ by no more than rounding in `dtype`."""
    precision = 1e-4 if dtype in (torch.float32, torch.float64) else 0.05
    return bool((one - other).abs().max() <= precision * other.abs().max())
