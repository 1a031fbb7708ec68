"""Mixtures of experts: what stays dense is counted, said, and part of what a budget of linears means."""

import pytest
import torch

import makd
from makd.anatomy import count_experts, resolve
from makd.errors import BudgetError
from makd.evaluation import parameter_counts
from tests.models import batch, tiny

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
        assert "stay dense" in text
        assert "up = " in text.partition("what every token goes through alone")[2]
        assert "shared_expert" in text.partition("what every token goes through alone")[2]

    def test_half_of_the_linears_that_cannot_be_met_is_an_error_that_says_what_experts_hold(self, name, words):
        model = tiny(name)
        with pytest.raises(BudgetError, match=rf"{by_name(model, words):,} of them are routed experts'"):
            makd.factorize(model, makd.Budget(keep_linears=0.5), solver="svd")

    def test_a_share_of_the_linears_is_one_of_all_linears_experts_included(self, name, words):
        model = tiny(name)
        student = makd.factorize(model, makd.Budget(keep_linears=0.9), solver="svd", rank_multiple=1)
        anatomy = resolve(model)
        linears = by_name(model, words) + sum(
            parameter.numel() for linear in anatomy.linears for parameter in model.get_submodule(linear).parameters()
        )
        assert parameter_counts(model, anatomy)["linears"] == linears
        kept = parameter_counts(student, resolve(student))["linears"]
        assert 0.9 * linears - 300 <= kept <= 0.9 * linears
        cut = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in student.parameters())
        assert cut == linears - kept

    def test_the_experts_of_a_student_are_its_teachers(self, name, words):
        model = tiny(name)
        student = makd.factorize(model, makd.Budget(keep_linears=0.9), solver="svd")
        assert resolve(student) == resolve(model)
        for parameter in resolve(model).experts:
            assert torch.equal(student.get_parameter(parameter), model.get_parameter(parameter))


@pytest.mark.parametrize("name", ["bert", "llama", "albert", "t5", "bart", "gpt2", "longformer"])
def test_dense_models_have_no_experts(name):
    assert resolve(tiny(name)).experts == ()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe_mixed", "gpt_oss", "deepseek_v2", "deepseek_v3"])
def test_a_mixture_without_shared_experts_or_with_dense_layers_is_factorized(name):
    teacher = tiny(name)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.95), calibration=[batch(teacher)])
    assert student.factorization.ranks
    assert resolve(student) == resolve(teacher)


def test_a_mixture_is_factorized_from_text_too():
    teacher = tiny("qwen2_moe")
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.9), calibration=[batch(teacher)])
    assert student.factorization.ranks


def test_a_factorization_logs_what_stays_dense(caplog):
    with caplog.at_level("INFO", logger="makd"):
        makd.factorize(tiny("qwen2_moe"), makd.Budget(keep_linears=0.9), solver="svd")
    assert any("the routed ones (mlp.experts, 24,576 parameters) stay dense" in line.message for line in caplog.records)
