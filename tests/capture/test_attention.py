"""Attention calls as transformers makes them: the same numbers, undone afterwards, and nothing slowed down."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from makd.anatomy import Role, resolve
from makd.capture import Tap, capture
from makd.capture.attention import _recorders
from tests.flash import FLASH, set_flash
from tests.models import batch, tiny


def take_calls(model, inputs):
    anatomy = resolve(model)
    kinds = (("attention", "attention"), ("cross_attention", "cross_attention"))
    taps = [Tap(layer.index, kind) for layer in anatomy.layers for kind, name in kinds if getattr(layer, name)]
    with torch.no_grad(), capture(model, anatomy, taps) as recording:
        model(**inputs)
    return recording.attention


def probabilities(call):
    """softmax(query keyᵀ · scale + bias + mask), written out in float64."""
    repeats = call.query.shape[1] // call.key.shape[1]
    key = call.key.double().repeat_interleave(repeats, dim=1)
    scores = call.query.double() @ key.transpose(-1, -2) * call.scale
    if call.position_bias is not None:
        scores = scores + call.position_bias.double()
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    if call.window is not None:
        near = torch.ones_like(scores).bool().triu(1 - call.window).tril(call.window - 1)
        scores = scores.masked_fill(~near, -torch.inf)
    if call.mask is not None:
        mask = call.mask[:, None, None].bool() if call.mask.dim() == 2 else call.mask
        hidden = ~mask if mask.dtype == torch.bool else mask < -1e30
        scores = scores.masked_fill(hidden.expand_as(scores), -torch.inf)
    return scores.softmax(-1)


NAMES = ["bert", "distilbert", "modernbert", "llama", "mistral", "gemma2", "gpt2", "gpt_neox", "t5", "bart"]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, None) for name in NAMES),  # their own: "sdpa", or "eager"
        *((name, FLASH) for name in ("bert", "modernbert", "llama", "mistral", "gemma3")),
    ],
)
def test_the_call_says_all_that_attention_depends_on(name, implementation):
    """Its probabilities are those that an eager model gives: masks, padding, windows, groups, softcap, bias."""
    model, eager = tiny(name), tiny(name)
    if implementation == FLASH:
        set_flash(model)
    eager.set_attn_implementation("eager")
    inputs = batch(model, padded=True)
    calls = take_calls(model, inputs)
    with torch.no_grad():
        output = eager(**inputs, output_attentions=True)
    if model.config.is_encoder_decoder:
        layers = [*output.encoder_attentions, *output.decoder_attentions]
        expected = {Tap(index, "attention"): weights for index, weights in enumerate(layers)}
        first = len(output.encoder_attentions)
        expected |= {Tap(first + i, "cross_attention"): weights for i, weights in enumerate(output.cross_attentions)}
    else:
        expected = {Tap(index, "attention"): weights for index, weights in enumerate(output.attentions)}
    assert calls.keys() == expected.keys()
    for tap, call in calls.items():
        decoder = model.config.is_encoder_decoder and tap.layer >= len(output.encoder_attentions)
        real = inputs["decoder_attention_mask" if decoder else "attention_mask"].bool()
        mine, theirs = (weights.transpose(1, 2)[real] for weights in (probabilities(call), expected[tap].double()))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_no_real_token_sees_the_padding():
    model = tiny("bert")
    inputs = batch(model, padded=True)
    padding = inputs["attention_mask"] == 0
    for call in take_calls(model, inputs).values():
        seen = probabilities(call) * padding[:, None, None, :]
        assert seen.transpose(1, 2)[~padding].max() == 0


def test_query_and_key_are_those_after_the_rotation():
    model = tiny("llama")
    inputs = batch(model, padded=False)
    anatomy = resolve(model)
    taps = (Tap(1, "attention"), Tap(1, "linear", Role.QUERY), Tap(1, "linear", Role.KEY))
    with torch.no_grad(), capture(model, anatomy, taps) as recording:
        model(**inputs)
        query, key = (recording.tensors[tap].unflatten(-1, (-1, 8)).transpose(1, 2) for tap in taps[1:])
        positions = torch.arange(query.shape[2])[None]
        rotated = apply_rotary_pos_emb(query, key, *model.rotary_emb(query, positions))
    call = recording.attention[taps[0]]
    torch.testing.assert_close(call.query, rotated[0])
    torch.testing.assert_close(call.key, rotated[1])
    assert call.key.shape[1] == model.config.num_key_value_heads < call.query.shape[1]


def test_nothing_is_copied(monkeypatch):
    model = tiny("llama")
    seen = []
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def note(module, query, key, value, mask, **settings):
        seen.append((query, key))
        return own(module, query, key, value, mask, **settings)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", note)
    calls = take_calls(model, batch(model))
    for call, (query, key) in zip(calls.values(), seen, strict=True):
        assert call.query is query
        assert call.key is key


class TestAfterTheBlock:
    """The entry in transformers' table is what it was, whatever happened."""

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    @pytest.mark.parametrize("fails", [False, True])
    def test_the_implementation_is_the_same(self, implementation, fails):
        model = tiny("bert")
        model.set_attn_implementation(implementation)
        before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), ALL_ATTENTION_FUNCTIONS.get(implementation)

        def fail(_module, _inputs):
            raise RuntimeError("in the middle of a forward")

        if fails:
            model.encoder.layer[1].register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="in the middle"):
                take_calls(model, batch(model))
        else:
            take_calls(model, batch(model))
        assert (dict(ALL_ATTENTION_FUNCTIONS._local_mapping), ALL_ATTENTION_FUNCTIONS.get(implementation)) == before
        assert _recorders == {}

    def test_an_implementation_that_somebody_else_put_there_is_back(self, monkeypatch):
        def mine(*arguments, **settings):
            return own(*arguments, **settings)

        own = ALL_ATTENTION_FUNCTIONS["sdpa"]
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", mine)
        model = tiny("bert")
        take_calls(model, batch(model))
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine


def test_a_model_that_is_not_recorded_is_left_alone():
    recorded, other = tiny("bert"), tiny("bert", seed=1)
    inputs = batch(recorded)
    with torch.no_grad():
        expected = other(**inputs)[0]
        with capture(recorded, resolve(recorded), (Tap(0, "attention"),)) as recording:
            found = other(**inputs)[0]
    assert torch.equal(found, expected)
    assert recording.attention == {}


def test_recordings_that_end_in_another_order_than_they_began_hear_all_and_leave_nothing():
    """As those of two threads do."""
    models = [tiny("bert"), tiny("bert", seed=1)]
    inputs, before = batch(models[0]), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    first, second = (capture(model, resolve(model), (Tap(0, "attention"),)) for model in models)
    first.__enter__()
    recording = second.__enter__()
    first.__exit__(None, None, None)
    with torch.no_grad():
        models[1](**inputs)
    second.__exit__(None, None, None)
    assert recording.attention.keys() == {Tap(0, "attention")}
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == before
    assert _recorders == {}
