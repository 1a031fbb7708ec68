"""Linears that share one A compute what they would apart, whatever they are called with; A is one parameter."""

import copy
from collections import Counter

import jaxtyping
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import makd
from makd.anatomy import Role, resolve
from makd.capture import Tap, capture
from makd.solvers.factors import Factors
from makd.student.folding import added_parameters
from makd.student.hub import mark_student
from makd.student.linear import LowRankLinear
from makd.student.shared_linear import FollowingLinear, settle_groups_, share_linears_
from tests.models import batch, numbers_in, tiny

BUDGET = makd.Budget(keep_linears=0.5)
NAMES = ("q", "k", "v")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, inputs):
        return torch.cat([self.q(inputs), self.k(inputs), self.v(inputs)], dim=-1)


def group():
    """Q, K and V with one A of rank 5, which is more than K and V have outputs."""
    torch.manual_seed(0)
    model = Attention()
    share_linears_(model, NAMES, Factors(torch.randn(20, 5), torch.randn(5, 8), 0.0))
    return model


def apart(model, name, inputs):
    """What a linear gives without any sharing."""
    linear = getattr(model, name)
    return nn.functional.linear(inputs, linear.dense_weight(), linear.bias)


def count_products(model):
    calls = Counter()
    model.q.reduce.register_forward_hook(lambda *_: calls.update(["A"]))
    return calls


def same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_is_one_parameter_and_its_product_is_computed_once():
    model, inputs = group(), torch.randn(3, 8)
    assert [name for name, _ in model.named_parameters() if "reduce" in name] == ["q.reduce.weight"]
    assert [name for name in model.state_dict() if "reduce" in name] == ["q.reduce.weight"]
    calls = count_products(model)
    same(model(inputs), torch.cat([apart(model, name, inputs) for name in NAMES], dim=-1))
    assert calls["A"] == 1
    model(inputs)  # nothing is kept from one forward to the next
    assert calls["A"] == 2


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_each_linear_sees_its_own_input(mode):
    model = group()
    with mode():
        one, two = torch.randn(3, 8), torch.randn(3, 8)
        for name, inputs in (("q", one), ("k", two), ("v", one), ("v", two), ("q", two), ("q", two), ("k", one)):
            same(getattr(model, name)(inputs), apart(model, name, inputs))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_was_written_to_in_between_is_computed_again(mode):
    model = group()
    with mode():
        inputs = torch.randn(3, 8)
        model.q(inputs)
        inputs.add_(1.0)
        same(model.k(inputs), apart(model, "k", inputs))
    with torch.no_grad():
        inputs = torch.randn(3, 8)
        model.q(inputs)
        model.q.reduce.weight.mul_(2.0)
        same(model.k(inputs), apart(model, "k", inputs))
        model.q(inputs)
        model.q.reduce.weight.data = torch.randn(5, 8)
        same(model.k(inputs), apart(model, "k", inputs))


def test_a_product_without_a_graph_is_not_used_where_one_is_needed():
    model, inputs = group(), torch.randn(3, 8)
    with torch.no_grad():
        model.q(inputs)
    model.k(inputs).sum().backward()
    assert model.q.reduce.weight.grad.abs().sum() > 0


def test_gradients_are_those_of_linears_apart_also_one_after_the_other():
    model, inputs = group(), torch.randn(3, 8)
    model(inputs).square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for name in NAMES:  # each backward frees the graph that it went through
        getattr(model, name)(inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        same(parameter.grad, found[name])
    model.zero_grad()
    torch.cat([apart(model, name, inputs) for name in NAMES], dim=-1).square().sum().backward()
    for name, parameter in model.named_parameters():
        same(parameter.grad, found[name])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, inputs = group(), torch.randn(3, 8, requires_grad=True)
    model(inputs).square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    checkpoint(model, inputs, use_reentrant=reentrant).square().sum().backward()
    for name, parameter in model.named_parameters():
        same(parameter.grad, found[name])


def test_autocast_that_begins_in_between_is_seen():
    model, inputs = group(), torch.randn(3, 8)
    with torch.no_grad():
        model.q(inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.k(inputs).dtype == torch.bfloat16
        assert model.v(inputs).dtype == torch.float32


def test_a_compiler_sees_plain_products(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what checks shapes in tests cannot be compiled
    model, inputs, seen = group(), torch.randn(3, 8), []

    def backend(graph, _examples):
        seen.append(graph)
        return graph.forward

    same(torch.compile(model, backend=backend, fullgraph=True)(inputs), model(inputs))
    assert len(seen) == 1


def test_copies_and_moves_keep_the_group_and_their_own_a():
    model, inputs = group(), torch.randn(3, 8)
    model.q(inputs)  # a product is waiting: it is not copied
    twin = copy.deepcopy(model)
    assert twin.k.leader is twin.q
    with torch.no_grad():
        twin.q.reduce.weight.zero_()
    assert model.k.dense_weight().abs().sum() > 0
    assert twin.k.dense_weight().abs().sum() == 0
    assert model.double().k.dense_weight().dtype == torch.float64


@pytest.mark.parametrize("name", ["q", "k"])
def test_a_linear_that_is_folded_back_takes_nothing_from_the_others(name):
    model, inputs = group(), torch.randn(3, 8)
    expected = model(inputs)
    dense, folded = getattr(model, name), nn.Linear(8, getattr(model, name).out_features)
    with torch.no_grad():
        folded.weight.copy_(dense.dense_weight())
        folded.bias.copy_(dense.bias)
    setattr(model, name, folded)
    left = [other for other in NAMES if other != name]
    assert settle_groups_(model) == {left[0]: (left[1],)}
    assert [key for key in model.state_dict() if "reduce" in key] == [f"{left[0]}.reduce.weight"]
    same(model(inputs), expected)


def test_the_last_of_a_group_is_an_ordinary_linear():
    model = group()
    model.q, model.k = nn.Linear(8, 12), nn.Linear(8, 4)
    assert settle_groups_(model) == {}
    assert type(model.v) is LowRankLinear
    assert model.v.shared is None


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "t5_gated", "qwen2", "albert", "deberta_v2", "bart"])
def test_a_student_reloads_bit_for_bit_with_a_in_one_place(name, tmp_path):
    teacher = tiny(name)
    student = makd.factorize(teacher, BUDGET, solver="svd", share_input="always")
    following = [name for name, module in student.named_modules() if isinstance(module, FollowingLinear)]
    assert following
    student.save_pretrained(tmp_path, max_shard_size="20KB")
    stored = {}
    for file in tmp_path.glob("*.safetensors"):
        stored |= load_file(file)
    assert numbers_in(tmp_path) == sum(p.numel() for p in student.parameters())
    assert not any(key.startswith(f"{name}.reduce") for name in following for key in stored)
    again = type(student).from_pretrained(tmp_path)
    assert makd.fingerprint(again) == makd.fingerprint(student)
    assert settle_groups_(again) == settle_groups_(student)
    again.save_pretrained(tmp_path / "again")
    assert makd.fingerprint(type(student).from_pretrained(tmp_path / "again")) == makd.fingerprint(student)


def test_a_student_loads_under_another_head_and_without_one(tmp_path):
    student = makd.factorize(tiny("bert"), BUDGET, solver="svd", share_input="always")
    student.save_pretrained(tmp_path / "base")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert makd.fingerprint(classifier.bert) == makd.fingerprint(student)
    causal = makd.factorize(tiny("llama", "causal_lm"), BUDGET, solver="svd", share_input="always")
    causal.save_pretrained(tmp_path / "causal")
    assert makd.fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "causal")) == makd.fingerprint(causal)
    assert makd.fingerprint(AutoModel.from_pretrained(tmp_path / "causal")) == makd.fingerprint(causal.model)


def test_folding_the_leader_of_a_student_loses_nothing_when_it_is_saved(tmp_path):
    student = makd.factorize(tiny("bert"), BUDGET, solver="svd", share_input="always")
    attention = student.encoder.layer[0].attention.self
    folded = nn.Linear(32, 32)
    folded.weight.data, folded.bias.data = attention.query.dense_weight().data, attention.query.bias.data
    attention.query = folded
    mark_student(student)
    student.save_pretrained(tmp_path)
    assert makd.fingerprint(AutoModel.from_pretrained(tmp_path)) == makd.fingerprint(student)


def test_generation_with_a_cache_is_that_of_linears_apart():
    student = makd.factorize(tiny("t5", "seq2seq_lm"), BUDGET, solver="svd", share_input="always")
    dense = tiny("t5", "seq2seq_lm")
    for name in student.factorization.ranks:
        dense.get_submodule(name).weight.data = student.get_submodule(name).dense_weight().data
    inputs = {name: value for name, value in batch(student, padded=False).items() if not name.startswith("decoder")}
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(student.generate(**inputs, **settings), dense.generate(**inputs, **settings))


def test_captured_outputs_are_those_of_each_linear():
    student = makd.factorize(tiny("bert"), BUDGET, solver="svd", share_input="always")
    anatomy = resolve(student)
    taps = [Tap(0, "linear", role) for role in (Role.QUERY, Role.KEY, Role.VALUE)]
    with capture(student, anatomy, taps) as recording, torch.no_grad():
        student(**batch(student))
        inputs = student.embeddings(batch(student)["input_ids"])
    for tap in taps:
        linear = student.get_submodule(anatomy.layers[0].roles[tap.role].module)
        expected = nn.functional.linear(inputs, linear.dense_weight(), linear.bias)
        torch.testing.assert_close(recording.tensors[tap], expected, rtol=1e-4, atol=1e-4)


def test_data_parallel_copies_are_refused_with_the_way_out():
    with pytest.raises(RuntimeError, match="torchrun"):
        group().k._replicate_for_data_parallel()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_folding_some_of_a_group_adds_the_parameters_that_are_foretold(count):
    student = makd.factorize(tiny("bert"), BUDGET, solver="svd", share_input="always")
    names = [f"encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")][:count]
    folded = makd.fold(student, names)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (student, folded))
    assert after - before == added_parameters(student, names)
    inputs = batch(student)
    with torch.no_grad():
        torch.testing.assert_close(folded(**inputs)[0], student(**inputs)[0], rtol=1e-4, atol=1e-4)
