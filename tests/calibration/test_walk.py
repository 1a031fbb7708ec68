"""A walk, layer by layer, sees what whole forwards and backwards of the model see."""

import copy

import pytest
import torch
from transformers import T5Config, T5EncoderModel
from transformers.modeling_outputs import BaseModelOutput

import makd
from makd.anatomy import resolve
from makd.calibration.frame import Frame
from makd.calibration.gradients import collect_gradient_moments
from makd.calibration.replay import NotLayerByLayer
from makd.calibration.source import ModelSource
from makd.calibration.statistics import collect_input_moments
from makd.calibration.store import DiskStore, MemoryStore
from makd.calibration.walk import Walk
from makd.errors import DataError, NumericsError
from makd.progress import nobody
from tests.models import batch, tiny

MODELS = [
    ("bert", "base"), ("bert", "masked_lm"), ("bert", "sequence_classification"), ("llama", "causal_lm"),
    ("llama", "base"), ("gpt2", "causal_lm"), ("gemma3", "causal_lm"), ("deberta_v2", "base"),
]  # fmt: skip


def batches_of(model, count=2):
    return [batch(model, seed=seed) for seed in range(count)]


def walk_of(model, batches=None, store=None, seed=0):
    return Walk(ModelSource(model), resolve(model), batches or batches_of(model), store or MemoryStore(), seed)


def frozen(model):
    return model.requires_grad_(False)


@pytest.mark.parametrize(("name", "head"), MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_are_those_of_whole_forwards_and_backwards(name, head, dtype):
    model = frozen(tiny(name, head).to(dtype))
    anatomy, batches = resolve(model), batches_of(model)
    walk = walk_of(model, batches, seed=3)
    assert not list(walk.up(nobody))
    walk.check_whole_model()
    inputs, gradients = {}, {}
    for moments in walk.down(nobody):
        inputs |= moments.inputs
        gradients |= moments.gradients
    read = collect_input_moments(model, anatomy, batches)
    given = collect_gradient_moments(model, anatomy, batches, seed=3)
    assert inputs.keys() == gradients.keys() == set(anatomy.linears)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-4
    for found, expected in ((inputs, read), (gradients, given)):
        for linear in anatomy.linears:
            assert found[linear].rows == expected[linear].rows
            error = torch.dist(found[linear].gram, expected[linear].gram) / expected[linear].gram.norm()
            assert error < tolerance, f"{linear}: {error}"


@pytest.mark.parametrize(("name", "head"), [("bert", "base"), ("llama", "causal_lm")])
def test_moments_that_are_handed_out_on_the_way_up_are_those_of_whole_forwards(name, head):
    model = tiny(name, head)
    batches, found = batches_of(model), {}
    for moments in walk_of(model, batches).up(nobody, keep=False, watch=True):
        found |= moments.inputs
    expected = collect_input_moments(model, resolve(model), batches)
    assert all(torch.equal(found[linear].gram, expected[linear].gram) for linear in resolve(model).linears)


def test_states_of_layers_that_are_done_are_not_kept_where_nobody_wants_them():
    store = MemoryStore()
    walk = walk_of(tiny("bert"), store=store)
    list(walk.up(nobody, keep=False))
    assert [f"teacher/{layer:04}/00000" in store for layer in range(3)] == [False, False, True]


def test_what_a_head_reads_is_what_it_reads_in_whole_forwards():
    model = tiny("llama", "causal_lm")
    batches = batches_of(model)
    walk = walk_of(model, batches)
    list(walk.up(nobody))
    expected = collect_input_moments(model, resolve(model), batches, "lm_head")["lm_head"]
    assert torch.equal(walk.head_inputs("lm_head").gram, expected.gram)


@pytest.mark.parametrize(
    ("name", "embeddings"), [("bert", "embeddings.word_embeddings"), ("llama", "embed_tokens"), ("gpt2", "wte")]
)
def test_gradients_at_embeddings_are_those_of_whole_backwards(name, embeddings):
    model = frozen(tiny(name).double())
    batches = batches_of(model)
    walk = walk_of(model, batches)
    list(walk.up(nobody))
    list(walk.down(nobody))
    found = walk.embedding_gradients({embeddings: 32})[embeddings]
    expected = collect_gradient_moments(model, resolve(model), batches, embeddings={embeddings: 32})[embeddings]
    torch.testing.assert_close(found.gram, expected.gram, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("name", ["bert", "llama", "gemma3", "deberta_v2", "gpt2"])
def test_the_frame_gives_the_first_states_and_the_models_outputs(name):
    model = tiny(name)
    frame, inputs = Frame(ModelSource(model), resolve(model)), batch(model)
    seen = []
    first = model.get_submodule(resolve(model).layers[0].module)
    last = model.get_submodule(resolve(model).layers[-1].module)
    hooks = [
        first.register_forward_pre_hook(lambda _m, args, named: seen.append((args, named)), with_kwargs=True),
        last.register_forward_hook(lambda _m, _i, output: seen.append(output)),
    ]
    with torch.no_grad():
        expected = model(**inputs, use_cache=False) if "use_cache" in model.config.to_dict() else model(**inputs)
    for hook in hooks:
        hook.remove()
    (args, named), output = seen
    hidden, *rest = (*args, *([named.pop("hidden_states")] if not args else []))
    with torch.no_grad(), frame.at_hand():
        calls = frame.enter(inputs)
        left = output[0] if isinstance(output, tuple) else output
        again = frame.leave(inputs, calls, left)
    assert torch.equal(calls.entering, hidden)
    positions, names = calls.arguments[0]
    assert len(positions) == len(rest)
    tensors = {key for key, value in named.items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(names[key], named[key]) for key in tensors)
    assert torch.equal(again[0], expected[0])
    assert not any("forward" in vars(module) for module in model.modules())


def t5_encoder():
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                                   pad_token_id=0, eos_token_id=2)  # fmt: skip
    return T5EncoderModel(config).eval()


def test_a_t5_encoders_position_bias_is_handed_on():
    model = t5_encoder()
    walk = walk_of(model, [batch(model)])
    list(walk.up(nobody))
    walk.check_whole_model()
    biases = [
        value
        for rest, named in walk.calls[0].arguments.values()
        for value in (*rest, *named.values())
        if isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[1] == 4
    ]
    assert biases, "the second layer is called with the first one's bias"


def test_a_t5_encoder_is_factorized_with_the_default_solver():
    model = t5_encoder()
    student = makd.factorize(model, makd.Budget(keep_linears=0.6), calibration=batches_of(model, 4), rank_multiple=4)
    found = makd.fidelity(student, model, [batch(model, seed=9)])
    assert found["cosine"] > 0.5


@pytest.mark.parametrize("name", ["t5", "bart", "albert"])
def test_two_stacks_and_shared_layers_cannot_be_walked_through(name):
    model = tiny(name)
    with pytest.raises(NotLayerByLayer, match="two stacks or shared layers"):
        walk_of(model, [batch(model)])


def test_work_between_layers_is_noticed():
    model = tiny("deberta_v2", conv_kernel_size=3, conv_act="gelu")
    with pytest.raises(NotLayerByLayer, match="Something besides layers works on the hidden states"):
        walk_of(model)


def test_several_hidden_states_of_a_token_are_noticed():
    with pytest.raises(NotLayerByLayer, match=r"shape \(2, \d+, \d+, 32\), which is not one state for each token"):
        walk_of(tiny("gemma3n"))


def test_work_that_only_shows_in_a_whole_forward_is_noticed():
    model = tiny("bert")
    inner, calls = model.encoder.layer[0], []
    forward = type(inner).forward

    def other_in_whole_forwards(hidden, *rest, **named):
        calls.append(len(calls))
        return forward(inner, hidden, *rest, **named) * (1.5 if len(calls) > 2 else 1.0)

    walk = walk_of(model)
    inner.forward = other_in_whole_forwards
    list(walk.up(nobody))
    with pytest.raises(NotLayerByLayer, match="ends in other hidden states"):
        walk.check_whole_model()


def test_a_layer_that_hands_on_something_of_its_own_is_noticed():
    model = t5_encoder()
    walk = walk_of(model, [batch(model)])
    second = model.encoder.block[1]
    forward = type(second).forward

    def own_bias(*args, **named):
        hidden, bias, *rest = forward(second, *args, **named)
        return (hidden, bias + 1, *rest)

    second.forward = own_bias
    with pytest.raises(NotLayerByLayer, match="hands on other things"):
        list(walk.up(nobody))


def test_arguments_that_follow_from_the_states_between_layers_are_noticed():
    model = tiny("bert")
    encoder = model.encoder

    def between(hidden_states, *args, **named):
        for layer in encoder.layer:
            mask = torch.zeros(len(hidden_states), 1, 1, hidden_states.shape[1]) + hidden_states.mean()
            hidden_states = layer(hidden_states, mask)
        return BaseModelOutput(last_hidden_state=hidden_states)

    encoder.forward = between
    with pytest.raises(NotLayerByLayer, match=r"What encoder\.layer\.1 is called with follows from"):
        walk_of(model)


def test_states_that_are_not_finite_are_told_with_the_layer():
    model = tiny("llama")
    walk = walk_of(model)
    model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"leave layers\.1 hold NaN"):
        list(walk.up(nobody))


def test_no_batches_are_refused():
    model = tiny("bert")
    with pytest.raises(DataError, match="at least one batch"):
        Walk(ModelSource(model), resolve(model), [], MemoryStore())


def test_a_walk_on_disk_is_that_in_memory_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _descriptor: None)
    model = frozen(tiny("bert"))
    grams = []
    for store in (MemoryStore(), DiskStore(tmp_path)):
        walk = walk_of(model, store=store)
        list(walk.up(nobody))
        found = {name: one.gram for moments in walk.down(nobody) for name, one in moments.gradients.items()}
        grams.append(found)
    assert all(torch.equal(grams[0][name], grams[1][name]) for name in grams[0])


def test_layers_whose_moments_were_taken_are_not_handed_out_again(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _descriptor: None)
    model = frozen(tiny("bert"))
    walk = walk_of(model, store=DiskStore(tmp_path))
    list(walk.up(nobody))
    down = walk.down(nobody)
    first, _second = next(down), next(down)  # asking for the second says that the first was taken
    again = walk_of(model, store=DiskStore(tmp_path))
    assert not list(again.up(nobody))
    (handed,) = again.down(nobody)
    assert set(handed.linears).isdisjoint(first.linears)
    assert not list(walk_of(model, store=DiskStore(tmp_path)).down(nobody))


@pytest.mark.parametrize("solver", ["whitened", "two_sided", "two_sided_regression"])
def test_students_are_the_same_wherever_states_are_kept(solver, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _descriptor: None)
    model = tiny("llama", "causal_lm")
    one, two = (
        makd.factorize(
            copy.deepcopy(model), makd.Budget(keep_linears=0.5), solver=solver, calibration=batches_of(model, 4),
            store=store,
        )
        for store in ("memory", "disk")
    )  # fmt: skip
    assert makd.fingerprint(one) == makd.fingerprint(two)


@pytest.mark.parametrize(
    ("name", "changes"), [("deberta_v2", {"conv_kernel_size": 3, "conv_act": "gelu"}), ("gemma3n", {})]
)
def test_a_model_whose_layers_cannot_be_run_one_by_one_gets_the_next_best_solver(name, changes):
    model = tiny(name, **changes)
    batches = batches_of(model, 4)
    student = makd.factorize(model, makd.Budget(keep_linears=0.5), calibration=batches)
    same = makd.factorize(model, makd.Budget(keep_linears=0.5), calibration=batches, solver="two_sided")
    assert makd.fingerprint(student) == makd.fingerprint(same)


def test_a_model_that_is_another_when_run_whole_gets_the_next_best_solver_and_a_warning(caplog, monkeypatch):
    def refuses(self):
        raise NotLayerByLayer("BertModel, run whole, ends in other hidden states.")

    model, batches = tiny("bert"), batches_of(tiny("bert"), 4)
    monkeypatch.setattr(Walk, "check_whole_model", refuses)
    with caplog.at_level("WARNING", logger="makd"):
        student = makd.factorize(model, makd.Budget(keep_linears=0.5), calibration=batches)
    assert any("'two_sided' in the place of 'two_sided_regression'" in message for message in caplog.messages)
    monkeypatch.setattr(Walk, "__init__", lambda *args, **named: refuses(None))
    whole = makd.factorize(model, makd.Budget(keep_linears=0.5), calibration=batches, solver="two_sided")
    assert makd.fingerprint(student) == makd.fingerprint(whole)
    with pytest.raises(makd.MakdError, match="Solver 'regression' fits layer after layer"):
        makd.factorize(model, makd.Budget(keep_linears=0.5), calibration=batches, solver="regression")
