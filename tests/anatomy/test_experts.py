"""Mixtures of experts: what stays dense too is counted, said, and part of what a budget of linears means."""

import pytest
import torch

import makd
from makd.anatomy import count_experts, resolve
from makd.errors import BudgetError
from makd.evaluation import parameter_counts
from tests.models import tiny

MIXTURES = {"qwen2_moe": "mlp.experts.", "glm4_moe": "mlp.experts.", "aria": "mlp.experts.",
            "llama4": "feed_forward.experts."}  # fmt: skip
"""Type -> what stands in the names of its routed experts' parameters, and in no other's."""


def by_name(model, words):
    return sum(parameter.numel() for name, parameter in model.named_parameters() if words in name)


@pytest.mark.parametrize(("name", "words"), MIXTURES.items())
class TestEveryMixture:
    def test_routed_experts_are_counted_and_shared_ones_are_not(self, name, words):
        model = tiny(name)
        assert count_experts(model, resolve(model)) == by_name(model, words) > 0

    def test_inspect_says_how_much_they_hold_and_whose_the_roles_are(self, name, words):
        model = tiny(name)
        text = " ".join(str(makd.inspect(model)).split())
        assert f"of experts {by_name(model, words):,}" in text
        assert "one rank for all 4 of a layer" in text
        assert "up = " in text.partition("what every token goes through alone")[2]
        assert "shared_expert" in text.partition("what every token goes through alone")[2]

    def test_half_of_the_linears_that_cannot_be_met_is_an_error_that_says_what_experts_hold(self, name, words):
        model = tiny(name)
        with pytest.raises(BudgetError, match=rf"{by_name(model, words):,} of them are routed experts'"):
            makd.factorize(model, makd.Budget(keep_linears=0.5), solver="svd", experts="dense")

    def test_a_share_of_the_linears_is_one_of_all_linears_experts_included(self, name, words):
        model = tiny(name)
        student = makd.factorize(model, makd.Budget(keep_linears=0.9), solver="svd", rank_multiple=1, experts="dense")
        anatomy = resolve(model)
        linears = by_name(model, words) + sum(
            parameter.numel() for linear in anatomy.linears for parameter in model.get_submodule(linear).parameters()
        )
        assert parameter_counts(model, anatomy)["linears"] == linears
        kept = parameter_counts(student, resolve(student))["linears"]
        assert 0.9 * linears - 300 <= kept <= 0.9 * linears
        cut = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in student.parameters())
        assert cut == linears - kept

    def test_experts_that_shall_stay_dense_are_the_teachers(self, name, words):
        model = tiny(name)
        student = makd.factorize(model, makd.Budget(keep_linears=0.9), solver="svd", experts="dense")
        assert resolve(student) == resolve(model)
        for parameter in resolve(model).experts:
            assert torch.equal(student.get_parameter(parameter), model.get_parameter(parameter))


@pytest.mark.parametrize("name", ["bert", "llama", "albert", "t5", "bart", "gpt2", "longformer"])
def test_dense_models_have_no_experts(name):
    assert resolve(tiny(name)).experts == ()


def test_stacks_are_told_apart_however_an_architecture_lays_them_out():
    for name in ("mixtral", "gpt_oss", "llama4"):  # (out, in), transposed with a bias, transposed without a word on it
        model = tiny(name)
        first, second = resolve(model).stacks[:2]
        assert (first.experts, first.out_features, first.in_features) == (4, 128, 32)
        assert (second.experts, second.out_features, second.in_features) == (4, 32, 64)
        assert first.has_bias == (name == "gpt_oss")
        assert sum(stack.parameters for stack in resolve(model).stacks) == count_experts(model, resolve(model))


def test_experts_that_are_no_stacks_stay_dense_with_the_reason():
    model = tiny("mixtral")
    model.layers[1].mlp.experts.scale = torch.nn.Parameter(torch.ones(1))
    anatomy = resolve(model)
    assert {stack.layer for stack in anatomy.stacks} == {0}
    assert any("others stay dense" in note and "what scale does" in note for note in anatomy.notes)
    assert "layers.1.mlp.experts.gate_up_proj" in anatomy.experts


def test_a_factorization_logs_what_experts_may_get(caplog):
    with caplog.at_level("INFO", logger="makd"):
        makd.factorize(tiny("qwen2_moe"), makd.Budget(keep_linears=0.9), solver="svd")
    assert any("the routed ones (mlp.experts) may get factors" in line.message for line in caplog.records)


def test_experts_that_do_something_besides_stay_dense_with_the_reason(monkeypatch):
    model = tiny("mixtral")
    experts = model.layers[1].mlp.experts
    monkeypatch.setattr(experts, "forward", lambda *given: 2 * type(experts).forward(experts, *given))
    found = makd.inspect(model).anatomy
    assert {stack.layer for stack in found.stacks} == {0}
    assert any("something else than their matrices alone" in note for note in found.notes)
    student = makd.factorize(model, makd.Budget(keep_linears=0.9), solver="svd")
    assert not any(".1.mlp.experts" in name for name in student.factorization.ranks)
