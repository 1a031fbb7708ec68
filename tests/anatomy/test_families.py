"""Every row of the table, held against what the model does in a forward."""

import pytest
import torch
from transformers.activations import ACT2FN

from makd.anatomy import Role, linear_shape, resolve
from makd.anatomy.families import FAMILIES, KNOWN, Fused
from makd.errors import UnsupportedModelError
from tests.anatomy.recording import watch
from tests.models import CONFIGS, RELATIVES, batch, tiny

EVERY = [*CONFIGS, *RELATIVES]
WITH_INTERFACE = [name for name in EVERY if name != "deberta_v2"]
GATED = [
    "modernbert", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "t5_gated", "gemma", "smollm3",
    "olmo2", "granite", "mt5",
]  # fmt: skip
ROTARY = [name for name in GATED if name not in ("t5_gated", "mt5")] + ["gpt_neox"]
NORMALISED = ["qwen3", "gemma3", "olmo2"]
"""Query and key are divided by their root mean square before they are rotated."""
SELF = (Role.QUERY, Role.KEY, Role.VALUE, Role.OUTPUT)
CROSS = (Role.CROSS_QUERY, Role.CROSS_KEY, Role.CROSS_VALUE, Role.CROSS_OUTPUT)


def forward(name):
    """The tiny model, its anatomy, and a forward without padding."""
    model = tiny(name)
    return model, resolve(model), watch(model, batch(model, padded=False))


def output_of(seen, layer, role):
    """What `role` gave in `layer`: its slice of its linear's output."""
    linear = layer.roles[role]
    whole = seen.outputs[linear.module][layer.call]
    return whole if linear.part is None else linear.part.select(whole)


def attention_calls(seen, anatomy):
    """(layer, its roles, its attention call) for self- and cross-attention, in the order of the anatomy."""
    expected = [
        (layer, roles)
        for layer in anatomy.layers
        for roles, attention in ((SELF, layer.attention), (CROSS, layer.cross_attention))
        if attention is not None
    ]
    assert len(expected) == len(seen.attention)
    return [(layer, roles, call) for (layer, roles), call in zip(expected, seen.attention, strict=True)]


def merged(heads):
    """(batch, heads, tokens, head_dim) as (batch, tokens, heads · head_dim)."""
    return heads.transpose(1, 2).flatten(2)


def activation(config):
    names = ("dense_act_fn", "hidden_activation", "activation_function", "activation", "hidden_act")
    return ACT2FN[next(getattr(config, name) for name in names if hasattr(config, name))]


def test_every_known_model_type_has_a_tiny_model_in_these_tests():
    assert {tiny(name).config.model_type for name in EVERY} == set(KNOWN)


def test_no_model_type_stands_in_two_rows():
    listed = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("name", EVERY)
class TestEveryFamily:
    def test_every_layer_has_attention_and_feed_forward_roles(self, name):
        for layer in resolve(tiny(name)).layers:
            feed_forward = [Role.GATE, Role.UP, Role.DOWN] if name in GATED else [Role.UP, Role.DOWN]
            cross = CROSS if layer.cross_attention else ()
            assert list(layer.roles) == [*SELF, *cross, *feed_forward]

    def test_slices_of_a_linear_cover_its_output_and_do_not_overlap(self, name):
        model = tiny(name)
        for layer in resolve(model).layers:
            for module in {linear.module for linear in layer.roles.values()}:
                out_features, in_features = linear_shape(model.get_submodule(module))
                assert sorted(model.get_submodule(module).weight.shape) == sorted((out_features, in_features))
                parts = [linear.part for linear in layer.roles.values() if linear.module == module]
                features = torch.arange(out_features)
                taken = [features if part is None else part.select(features[None].float())[0].long() for part in parts]
                assert torch.equal(torch.cat(taken).sort().values, features)

    def test_layers_are_called_in_the_order_of_the_anatomy(self, name):
        _, anatomy, seen = forward(name)
        modules = {layer.module for layer in anatomy.layers}
        assert [called for called in seen.order if called in modules] == [layer.module for layer in anatomy.layers]
        assert [layer.index for layer in anatomy.layers] == list(range(len(anatomy.layers)))

    def test_linears_are_called_in_the_order_of_the_anatomy(self, name):
        """Up to order among linears that read the same input, which a forward may call in any order."""
        _, anatomy, seen = forward(name)
        linears = list(dict.fromkeys(called for called in seen.order if called in anatomy.linears))
        assert sorted(linears) == sorted(anatomy.linears)
        ends = {
            layer.roles[role].module
            for layer in anatomy.layers
            for role in (Role.OUTPUT, Role.CROSS_OUTPUT, Role.DOWN)
            if role in layer.roles
        }
        assert [linear for linear in linears if linear in ends] == [
            linear for linear in anatomy.linears if linear in ends
        ]

    def test_the_down_linear_reads_the_activated_up_or_gate(self, name):
        model, anatomy, seen = forward(name)
        act = activation(model.config)
        for layer in anatomy.layers:
            up = output_of(seen, layer, Role.UP)
            down_input = seen.inputs[layer.roles[Role.DOWN].module][layer.call].view_as(up)
            if name not in GATED:
                torch.testing.assert_close(down_input, act(up))
                continue
            gate = output_of(seen, layer, Role.GATE)
            torch.testing.assert_close(down_input, act(gate) * up)
            assert not torch.allclose(down_input, gate * act(up), atol=1e-3)  # so the roles are not exchanged

    def test_the_embeddings_read_the_token_ids(self, name):
        model = tiny(name)
        (embedding,) = resolve(model).embeddings
        assert model.get_submodule(embedding).num_embeddings == model.config.vocab_size


@pytest.mark.parametrize("name", WITH_INTERFACE)
class TestAttentionOfEveryFamily:
    def test_the_named_module_calls_the_attention_interface(self, name):
        model, anatomy, seen = forward(name)
        for layer, roles, call in attention_calls(seen, anatomy):
            attention = layer.attention if roles is SELF else layer.cross_attention
            assert call.module is model.get_submodule(attention)

    def test_the_value_is_what_the_attention_receives(self, name):
        _, anatomy, seen = forward(name)
        for layer, roles, call in attention_calls(seen, anatomy):
            torch.testing.assert_close(merged(call.value), output_of(seen, layer, roles[2]))

    def test_query_and_key_are_what_the_attention_receives(self, name):
        """Exactly; with rotary positions at position 0, which is not rotated; under a norm up to its scale."""
        model, anatomy, seen = forward(name)
        scale = (model.config.hidden_size // model.config.num_attention_heads) ** -0.5 if name == "opt" else 1.0
        for layer, roles, call in attention_calls(seen, anatomy):
            for role, received, factor in ((roles[0], call.query, scale), (roles[1], call.key, 1.0)):
                projected = factor * output_of(seen, layer, role)
                received_flat = merged(received)
                if name in ROTARY:
                    projected, received_flat = projected[:, 0], received_flat[:, 0]
                if name in NORMALISED:
                    width = received.shape[-1]
                    projected = torch.nn.functional.normalize(projected.unflatten(-1, (-1, width)), dim=-1)
                    received_flat = torch.nn.functional.normalize(received_flat.unflatten(-1, (-1, width)), dim=-1)
                torch.testing.assert_close(received_flat, projected)

    def test_the_output_linear_reads_what_the_attention_gives(self, name):
        _, anatomy, seen = forward(name)
        for layer, roles, call in attention_calls(seen, anatomy):
            read = seen.inputs[layer.roles[roles[3]].module][layer.call]
            torch.testing.assert_close(read.reshape(-1), call.output.reshape(-1))


class TestDeBERTa:
    """Its attention is its own: scores are scaled, relative terms added, no interface is called."""

    def test_the_attention_aspect_is_off_with_a_reason(self):
        anatomy = resolve(tiny("deberta_v2"))
        assert "attention interface" in anatomy.off["attention"]
        assert all(layer.attention is None for layer in anatomy.layers)

    def test_query_key_value_give_the_attention_when_relative_terms_are_switched_off(self):
        model = tiny("deberta_v2", relative_attention=False, pos_att_type=[])
        anatomy, seen = resolve(model), watch(model, batch(model, padded=False))
        for layer in anatomy.layers:
            heads = [
                output_of(seen, layer, role).double().unflatten(-1, (4, -1)).transpose(1, 2)
                for role in (Role.QUERY, Role.KEY, Role.VALUE)
            ]
            query, key, value = heads
            weights = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, dim=-1)
            read = seen.inputs[layer.roles[Role.OUTPUT].module][layer.call]
            torch.testing.assert_close(read, merged(weights @ value).float())

    def test_linears_that_read_relative_positions_stay_dense_and_are_named_in_the_notes(self):
        model = tiny("deberta_v2", share_att_key=False)
        anatomy = resolve(model)
        assert not any("pos_" in linear for linear in anatomy.linears)
        (note,) = anatomy.notes
        assert "attention.self.pos_key_proj" in note
        assert "attention.self.pos_query_proj" in note


def test_layers_that_share_weights_are_told_apart_by_their_call():
    model = tiny("albert", num_hidden_layers=4, num_hidden_groups=2)
    anatomy, seen = resolve(model), watch(model, batch(model))
    groups = [f"encoder.albert_layer_groups.{group}.albert_layers.0" for group in (0, 1)]
    assert [(layer.module, layer.call) for layer in anatomy.layers] == [
        (groups[0], 0), (groups[0], 1), (groups[1], 0), (groups[1], 1),
    ]  # fmt: skip
    assert [called for called in seen.order if called in groups] == [layer.module for layer in anatomy.layers]
    assert len(anatomy.linears) == 2 * 6


def test_every_layer_of_a_shared_group_is_a_layer():
    model = tiny("albert", num_hidden_layers=2, inner_group_num=2)
    anatomy, seen = resolve(model), watch(model, batch(model))
    modules = {layer.module for layer in anatomy.layers}
    assert len(modules) == 2
    assert [(layer.module[-1], layer.call) for layer in anatomy.layers] == [("0", 0), ("1", 0), ("0", 1), ("1", 1)]
    assert [called for called in seen.order if called in modules] == [layer.module for layer in anatomy.layers]


@pytest.mark.parametrize("layout", ["equal", "grouped_query", "interleaved"])
def test_a_fused_output_that_does_not_divide_is_an_error_that_names_it(layout):
    config = tiny("phi3").config  # 4 heads, 2 key heads
    with pytest.raises(UnsupportedModelError, match=r"qkv_proj has 65 output features"):
        Fused("self_attn.qkv_proj", 0, 3, layout).locate(65, config)
