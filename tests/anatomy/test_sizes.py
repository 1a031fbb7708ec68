"""Widths and heads of layers, of models that keep them in one config and of those that have one for each part."""

import pytest

from makd.anatomy import resolve
from makd.anatomy.sizes import head_count, hidden_width
from tests.models import CONFIGS, GEMMA2, RELATIVES, tiny


@pytest.mark.parametrize("name", [*CONFIGS, *RELATIVES])
def test_every_familys_layers_say_their_width_and_heads(name):
    model = tiny(name)
    expected = 48 if name == "mobilebert" else 32
    assert {(hidden_width(model, layer), head_count(model, layer)) for layer in resolve(model).layers} == {
        (expected, 4)
    }


def test_stacks_of_two_widths_have_each_its_own():
    model = tiny("t5gemma", decoder={**GEMMA2, "hidden_size": 48, "cross_attention_hidden_size": 32})
    found = [(layer.stack, hidden_width(model, layer)) for layer in resolve(model).layers]
    assert found == [("encoder", 32), ("encoder", 32), ("decoder", 48), ("decoder", 48)]


def test_stacks_of_one_config_have_each_its_own_heads():
    model = tiny("bart", decoder_attention_heads=2)
    assert [head_count(model, layer) for layer in resolve(model).layers] == [4, 4, 2, 2]
