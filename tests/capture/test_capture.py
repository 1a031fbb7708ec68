"""What a forward leaves behind for the aspects: the right tensors, by reference, and nothing else."""

import pytest
import torch
from torch import Tensor

from makd.anatomy import Role, resolve
from makd.capture import Tap, capture
from tests.anatomy.recording import watch
from tests.models import batch, tiny

ONE_OF_EACH_KIND = ("bert", "gpt2", "gpt_neox", "phi3", "albert", "t5", "bart")
"""Plain linears, a fused Conv1D, an interleaved one, a fused gate, shared layers, two stacks (pre- and post-norm)."""


def take(model, taps, inputs, **settings):
    with torch.no_grad(), capture(model, resolve(model), taps) as recording:
        output = model(**inputs, **settings)
    return recording, output


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_linears_are_the_outputs_that_a_forward_hook_sees(name):
    model = tiny(name)
    anatomy, inputs = resolve(model), batch(model)
    taps = [Tap(layer.index, "linear", role) for layer in anatomy.layers for role in layer.roles]
    recording, _ = take(model, taps, inputs)
    seen = watch(model, inputs).outputs
    assert recording.tensors.keys() == set(taps)
    for tap, tensor in recording.tensors.items():
        layer = anatomy.layers[tap.layer]
        linear = layer.roles[tap.role]
        expected = seen[linear.module][layer.call]
        assert torch.equal(tensor, expected if linear.part is None else linear.part.select(expected)), tap


@pytest.mark.parametrize("name", ["bert", "albert", "modernbert", "gpt2", "llama"])
def test_hidden_states_are_the_models_own(name):
    """transformers' `output_hidden_states`: embeddings first; the last one may have gone through a final norm."""
    model = tiny(name)
    taps = [Tap(layer.index, "hidden") for layer in resolve(model).layers]
    recording, output = take(model, taps, batch(model), output_hidden_states=True)
    assert len(output.hidden_states) == len(taps) + 1
    for tap, expected in zip(taps[:-1], output.hidden_states[1:], strict=False):
        assert torch.equal(recording.tensors[tap], expected)


def test_nothing_is_copied():
    model = tiny("gpt2")
    fused, hidden = [], []
    model.h[0].attn.c_attn.register_forward_hook(lambda module, inputs, output: fused.append(output))
    model.h[0].register_forward_hook(lambda module, inputs, output: hidden.append(output))
    recording, _ = take(model, (Tap(0, "linear", Role.KEY), Tap(0, "hidden")), batch(model))
    whole = hidden[0][0] if isinstance(hidden[0], tuple) else hidden[0]
    assert recording.tensors[Tap(0, "hidden")] is whole
    key = recording.tensors[Tap(0, "linear", Role.KEY)]
    assert key.untyped_storage().data_ptr() == fused[0].untyped_storage().data_ptr()


def test_what_is_recorded_is_brought_to_the_device_that_is_named():
    """A model that is spread over devices has each layer's tensors elsewhere; `meta` stands for another device."""
    model = tiny("llama")
    taps = (Tap(0, "linear", Role.KEY), Tap(1, "hidden"), Tap(1, "attention"))
    with torch.no_grad(), capture(model, resolve(model), taps, device=torch.device("meta")) as recording:
        model(**batch(model))
    assert {tap: tensor.device.type for tap, tensor in recording.tensors.items()} == dict.fromkeys(taps[:2], "meta")
    assert recording.attention[taps[2]].query.is_meta


def test_only_what_was_asked_for_is_kept():
    model = tiny("bert")
    recording, _ = take(model, (Tap(1, "linear", Role.UP),), batch(model))
    assert recording.tensors.keys() == {Tap(1, "linear", Role.UP)}
    assert recording.attention == {}


def test_captured_tensors_carry_the_gradient_to_the_weights_before_them():
    model = tiny("bert")
    tap = Tap(0, "hidden")
    with capture(model, resolve(model), (tap,)) as recording:
        model(**batch(model))
    recording.tensors[tap].sum().backward()
    assert model.encoder.layer[0].attention.self.query.weight.grad is not None
    assert model.encoder.layer[1].attention.self.query.weight.grad is None


def test_padded_tokens_keep_their_place():
    """Masking is the losses' business: rows and tokens of a captured tensor are those of the batch."""
    model = tiny("bert")
    inputs = batch(model, padded=True)
    recording, _ = take(model, (Tap(0, "linear", Role.QUERY), Tap(1, "hidden")), inputs)
    assert {tuple(tensor.shape[:2]) for tensor in recording.tensors.values()} == {tuple(inputs["input_ids"].shape)}


def test_teacher_and_student_are_recorded_one_inside_the_other():
    teacher, student = tiny("bert", seed=0), tiny("bert", seed=1)
    inputs, taps = batch(teacher), (Tap(0, "hidden"), Tap(0, "attention"))
    alone = [take(model, taps, inputs)[0] for model in (teacher, student)]
    with torch.no_grad(), capture(teacher, resolve(teacher), taps) as outer:
        with capture(student, resolve(student), taps) as inner:
            student(**inputs)
        teacher(**inputs)
    for recording, expected in zip((outer, inner), alone, strict=True):
        assert torch.equal(recording.tensors[taps[0]], expected.tensors[taps[0]])
        assert torch.equal(recording.attention[taps[1]].query, expected.attention[taps[1]].query)


def test_hooks_of_others_stay():
    model = tiny("bert")
    called: list[Tensor] = []
    model.encoder.layer[0].register_forward_hook(lambda module, inputs, output: called.append(output))
    take(model, (Tap(0, "hidden"),), batch(model))
    model(**batch(model))
    assert len(called) == 2
    assert len(model.encoder.layer[0]._forward_hooks) == 1
