"""Every row of the table, held against what the model does in a forward."""

import pytest
import torch
from transformers.activations import ACT2FN

from makd.anatomy import Role, linear_shape, resolve
from makd.anatomy.families import BY_HEAD, BY_KEY_HEAD, GROUPED_QUERY, HALVES, THIRDS, Fused, Layout
from makd.anatomy.table import ANATOMIES, FAMILIES, REFUSED
from makd.errors import UnsupportedModelError
from tests.anatomy.recording import watch
from tests.models import CONFIGS, RELATIVES, batch, tiny

EVERY = [*CONFIGS, *RELATIVES]
OWN_ATTENTION = [
    "deberta_v2", "deberta", "bloom", "falcon", "falcon_multi_query", "falcon_alibi", "mpt", "openai_gpt", "gpt_neo",
    "gpt_neox_japanese", "ctrl", "longt5", "longt5_global", "mvp", "pegasus_x", "bigbird_pegasus", "led", "prophetnet",
]  # fmt: skip
"""They compute attention outside transformers' interface."""
WITH_INTERFACE = [name for name in EVERY if name not in OWN_ATTENTION]
GATED = [
    "modernbert", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "t5_gated", "gemma", "smollm3",
    "olmo2", "granite", "mt5", "glm", "glm4", "modernbert_decoder", "t5gemma", "umt5", "longt5_global",
    "gemma3_images",
]  # fmt: skip
ROTARY = [name for name in GATED if name not in ("t5_gated", "mt5", "umt5", "longt5_global")] + [
    "gpt_neox", "gptj", "codegen", "persimmon", "starcoder2", "phi",
]  # fmt: skip
NORMALISED = ["qwen3", "gemma3", "olmo2", "gemma3_images"]
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


def activation(name, config):
    if name == "t5gemma":
        config = config.decoder
    config = config.get_text_config()
    if name in ("mpt", "falcon", "falcon_multi_query", "falcon_alibi"):
        return torch.nn.GELU()
    if name == "ctrl":
        return torch.nn.ReLU()
    if name in ("bloom", "openai_gpt"):
        return ACT2FN["gelu_new"]
    names = ("dense_act_fn", "hidden_activation", "activation_function", "activation", "hidden_act")
    return ACT2FN[next(getattr(config, name) for name in names if hasattr(config, name))]


def test_every_known_model_type_has_a_tiny_model_in_these_tests():
    assert {tiny(name).config.model_type for name in EVERY} == set(ANATOMIES)


def test_no_model_type_stands_in_two_rows():
    listed = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("name", EVERY)
class TestEveryFamily:
    def test_every_layer_has_attention_and_feed_forward_roles(self, name):
        for layer in resolve(tiny(name)).layers:
            feed_forward = [Role.GATE, Role.UP, Role.DOWN] if name in GATED else [Role.UP, Role.DOWN]
            cross = CROSS if tiny(name).config.is_encoder_decoder and layer.stack == "decoder" else ()
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
        act = activation(name, model.config)
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
        assert model.get_submodule(embedding).num_embeddings == model.config.get_text_config().vocab_size


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


def changed_role(model, layer, role, change):
    """A hook that gives the role's part of its linear's output to `change`, which returns another."""
    linear = layer.roles[role]
    module = model.get_submodule(linear.module)
    features = torch.arange(linear_shape(module)[0])
    mine = features if linear.part is None else linear.part.select(features[None].float())[0].long()

    def hook(_module, _inputs, output):
        whole = output.clone()
        whole[..., mine] = change(output[..., mine])
        return whole

    return module.register_forward_hook(hook)


def mixed(model, layer, roles, **changes):
    """What attention in `layer` gives to its output linear, when roles are changed."""
    hooks = [changed_role(model, layer, role, change) for role, change in changes.items()]
    seen = watch(model, batch(model, padded=False))
    for hook in hooks:
        hook.remove()
    return seen.inputs[layer.roles[roles[3]].module][0]


WITHOUT_RELATIVE_TERMS = {"relative_attention": False, "pos_att_type": []}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def own_attentions(name):
    """The tiny model with scores far from 0, and (layer, roles) of every attention in it."""
    changes = WITHOUT_RELATIVE_TERMS if name.startswith("deberta") else {}
    model = tiny(name, **changes)
    model.get_input_embeddings().weight.data *= 10.0
    anatomy = resolve(model)
    return model, [(layer, roles) for layer in anatomy.layers for roles in (SELF, CROSS) if roles[0] in layer.roles]


@pytest.mark.parametrize("name", OWN_ATTENTION)
class TestAttentionOutsideTheInterface:
    """softmax(Q K) V, whatever is added to the scores, tells its three inputs apart by what a change of each does."""

    def test_the_attention_aspect_is_off_with_a_reason(self, name):
        anatomy = resolve(tiny(name))
        assert "attention interface" in anatomy.off["attention"]
        assert all(layer.attention is layer.cross_attention is None for layer in anatomy.layers)

    def test_a_number_added_to_every_value_is_added_to_what_is_mixed(self, name):
        """Weights sum to 1; each head of values has its own numbers, and serves the heads of its group."""
        model, attentions = own_attentions(name)
        for layer, roles in attentions:
            width = output_width(model, layer, roles[2])
            added = torch.arange(1.0, width + 1)
            before = mixed(model, layer, roles)
            after = mixed(model, layer, roles, **{roles[2]: lambda value, added=added: value + added})
            head = head_width(model)
            heads = added.unflatten(0, (-1, head))
            expected = heads.repeat_interleave(before.shape[-1] // head // len(heads), dim=0).flatten()
            torch.testing.assert_close(after - before, expected.expand_as(before), **CLOSE)

    def test_keys_times_a_number_undo_queries_divided_by_it_head_by_head(self, name):
        model, attentions = own_attentions(name)
        for layer, roles in attentions:
            head = head_width(model)
            key_heads = output_width(model, layer, roles[1]) // head
            group = output_width(model, layer, roles[0]) // head // key_heads
            factors = torch.linspace(0.5, 2.0, key_heads)
            by_feature = factors.repeat_interleave(head)
            by_query = factors.repeat_interleave(group * head)
            before = mixed(model, layer, roles)
            both = {roles[0]: lambda query, by=by_query: query / by, roles[1]: lambda key, by=by_feature: key * by}
            torch.testing.assert_close(mixed(model, layer, roles, **both), before, **CLOSE)
            one = {roles[1]: both[roles[1]]}
            assert not torch.allclose(mixed(model, layer, roles, **one), before, atol=1e-3)

    def test_a_query_has_a_say_at_its_own_token_only_and_a_key_at_others(self, name):
        model, attentions = own_attentions(name)
        for layer, roles in attentions:
            before = mixed(model, layer, roles)

            def at_token_1(states):
                changed = states.clone()
                changed.select(token_axis(states), 1).mul_(-2.0)
                return changed

            for role, expected in ((roles[0], {1}), (roles[1], None)):
                after = mixed(model, layer, roles, **{role: at_token_1})
                differs = (after - before).abs().amax(-1).flatten(0, -2).amax(0) > 1e-4
                tokens = set(differs.nonzero().flatten().tolist())
                assert tokens == expected if expected else tokens - {1}


def output_width(model, layer, role):
    """Features of a role's output."""
    linear = layer.roles[role]
    whole = linear_shape(model.get_submodule(linear.module))[0]
    return whole if linear.part is None else linear.part.features


def head_width(model):
    return 32 // 4


def token_axis(states):
    """Of (batch, tokens, features), or of Longformer's (tokens, batch, features)."""
    return 0 if states.shape[1] == 4 and states.shape[0] != 4 else 1


@pytest.mark.parametrize("name", ["deberta", "deberta_v2"])
def test_linears_that_read_relative_positions_stay_dense_and_are_named_in_the_notes(name):
    model = tiny(name, share_att_key=False)
    anatomy = resolve(model)
    assert not any("pos_" in linear for linear in anatomy.linears)
    (note,) = anatomy.notes
    assert note.count("attention.self.pos_") == 2


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


@pytest.mark.parametrize("layout", [HALVES, THIRDS, GROUPED_QUERY, BY_HEAD, BY_KEY_HEAD], ids=str)
def test_a_fused_output_that_does_not_divide_is_an_error_that_names_it(layout):
    config = tiny("phi3").config  # 4 heads, 2 key heads
    with pytest.raises(UnsupportedModelError, match=r"qkv_proj has 65 output features"):
        Fused("self_attn.qkv_proj", 0, layout).locate(65, config)


def test_parts_stand_in_groups_one_after_the_other():
    output = torch.arange(24.0)[None]
    layout = Layout(2, (4, 1, 1))
    query, key, value = (layout.locate(index, 24, tiny("phi3").config).select(output)[0] for index in range(3))
    assert query.tolist() == [*range(8), *range(12, 20)]
    assert (key.tolist(), value.tolist()) == ([8, 9, 20, 21], [10, 11, 22, 23])


def test_no_model_type_is_both_known_and_refused():
    assert not ANATOMIES.keys() & REFUSED.keys()
