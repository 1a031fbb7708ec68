"""Where outputs join the residual stream, in layers of every make."""

import pytest
import torch
from torch import nn

from makd.anatomy import Role, resolve
from makd.calibration.residual import Sum, find_sum
from tests.models import batch, tiny

BERT = ("attention.output.LayerNorm", "output.LayerNorm")
LLAMA = ("post_attention_layernorm", "")
JOINED = {
    "bert": BERT,
    "roberta": BERT,
    "electra": BERT,
    "deberta_v2": BERT,
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
    "modernbert": ("mlp_norm", ""),
    "gpt2": ("ln_2", ""),
    "gpt_neox": ("", ""),
    "opt": ("final_layer_norm", ""),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "phi3": LLAMA,
}
"""Family -> the module that reads the sum after the attention's output and after the feed-forward's; "" for none."""


def sums(model, layer=0):
    """What is found for the two linears of a layer that is run inside the whole model."""
    anatomy = resolve(model)
    place = anatomy.layers[layer]
    module, output = model.get_submodule(place.module), []

    def forward():
        hook = module.register_forward_hook(lambda _m, _i, out: output.append(out))
        model(**batch(model, padded=False), use_cache=False)
        hook.remove()
        return output[-1][0] if isinstance(output[-1], tuple) else output[-1]

    return [
        find_sum(module, model.get_submodule(place.roles[role].module), forward) for role in (Role.OUTPUT, Role.DOWN)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", JOINED)
def test_the_sum_is_found_in_every_family_and_precision(family, dtype):
    assert sums(tiny(family).to(dtype)) == [Sum(module) for module in JOINED[family]]


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "olmo2"])
def test_a_norm_between_output_and_sum_leaves_none(family):
    assert sums(tiny(family)) == [None, None]


def test_a_scaled_output_has_no_sum_of_its_own():
    assert sums(tiny("granite", residual_multiplier=0.5)) == [None, None]


class Chain(nn.Module):
    """A layer without a residual stream."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden):
        return self.second(self.first(hidden))


def test_an_output_that_is_read_alone_has_no_sum():
    layer, hidden = Chain(), torch.randn(1, 3, 4)
    assert find_sum(layer, layer.first, lambda: layer(hidden)) is None
    assert find_sum(layer, layer.second, lambda: layer(hidden)) is None


def test_the_layer_is_left_without_hooks():
    layer, hidden = Chain(), torch.randn(1, 3, 4)
    find_sum(layer, layer.first, lambda: layer(hidden))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
