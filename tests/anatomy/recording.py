"""What a model does in one forward, noted independently of makd: every linear's calls and every attention call."""

import sys
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass(frozen=True)
class AttentionCall:
    """Tensors of one call of the attention interface: (batch, heads, tokens, head_dim), and what it gives back."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


@dataclass(frozen=True)
class Forward:
    """Calls in the order in which they were made."""

    inputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    order: list[str] = field(default_factory=list)
    attention: list[AttentionCall] = field(default_factory=list)


def watch(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Forward:
    """One forward of `model` on `batch`, with every module's first input and its output, if these are tensors."""
    seen = Forward()

    def note(name):
        def hook(_module, inputs, output):
            seen.order.append(name)
            if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
                seen.inputs[name].append(inputs[0])
                seen.outputs[name].append(output)

        return hook

    implementation = model.config._attn_implementation
    inner = ALL_ATTENTION_FUNCTIONS.get(implementation)

    def attention(module, query, key, value, *arguments, **settings):
        # "eager" is in no table: it is a function beside the module's class
        own = inner or sys.modules[type(module).__module__].eager_attention_forward
        output, weights = own(module, query, key, value, *arguments, **settings)
        seen.attention.append(AttentionCall(module, query, key, value, output))
        return output, weights

    with ExitStack() as after, torch.no_grad():
        for name, module in model.named_modules():
            after.callback(module.register_forward_hook(note(name)).remove)
        ALL_ATTENTION_FUNCTIONS[implementation] = attention
        after.callback(ALL_ATTENTION_FUNCTIONS.__delitem__, implementation)
        model(**batch)
    return seen
