"""Routed experts get factors: within the budget, from the tokens that each gets, alone or with one side for all."""

import pytest
import torch
from safetensors.torch import load_file

import makd
from makd.anatomy import resolve
from makd.errors import SettingError
from makd.evaluation import parameter_counts
from makd.factorization.settings import FactorizeConfig
from makd.factorization.streamed import check_streamable, stream_student
from makd.factorization.work import Work
from makd.loading import load_empty_model
from makd.student.experts import FactoredStack
from makd.student.linear import LowRankLinear
from tests.models import MIXTURES, batch, tiny


def stacks_of(student):
    return {name: module for name, module in student.named_modules() if isinstance(module, FactoredStack)}


def distance(student, teacher, inputs):
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        found, expected = (model(**inputs)[0][real] for model in (student, teacher))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", MIXTURES)
class TestEveryMixture:
    def test_a_share_of_the_linears_is_met_with_experts_in_it_and_the_report_tells_of_them(self, name):
        teacher = tiny(name)
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), calibration=[batch(teacher)])
        whole, kept = (parameter_counts(model, resolve(model))["linears"] for model in (teacher, student))
        steps = [sum(teacher.get_submodule(linear).weight.shape) for linear in resolve(teacher).linears]
        assert 0.5 * whole - min(steps) <= kept <= 0.5 * whole  # `global`: a single linear takes what is left
        assert stacks_of(student)
        report = student.factorization
        for stack in resolve(teacher).stacks:
            assert stack.name in report.ranks or stack.name in report.dense
            if stack.name in report.ranks:
                assert 0 <= report.errors[stack.name] <= 1

    def test_text_helps(self, name):
        teacher, inputs = tiny(name), batch(tiny(name))
        plain, seen = (
            makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver=solver, calibration=[inputs])
            for solver in ("svd", "auto")
        )
        assert distance(seen, teacher, inputs) < 0.9 * distance(plain, teacher, inputs)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_config_that_asks_for_the_routers_logits_makes_no_other_student(name):
    made = []
    for asked in (False, True):
        teacher = tiny(name, "causal_lm", output_router_logits=asked)
        made.append(makd.factorize(teacher, makd.Budget(keep_linears=0.5), calibration=[batch(teacher)]))
        assert teacher.config.output_router_logits is made[-1].config.output_router_logits is asked
    assert all(torch.equal(value, made[1].state_dict()[key]) for key, value in made[0].state_dict().items())


class TestOneSideForAll:
    def test_experts_that_look_at_the_same_share_a_and_others_do_not(self):
        teacher = tiny("mixtral")
        first, other = (teacher.get_parameter(f"layers.{layer}.mlp.experts.gate_up_proj") for layer in (0, 1))
        generator = torch.Generator().manual_seed(0)
        common = torch.randn(6, 32, generator=generator)
        with torch.no_grad():
            for expert in range(4):
                first[expert] = torch.randn(128, 6, generator=generator) @ common / 8
                other[expert] = torch.randn(128, 6, generator=generator) @ torch.randn(6, 32, generator=generator) / 8
        inputs = [batch(teacher, padded=False, seed=seed) for seed in range(8)]
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.3), solver="two_sided", calibration=inputs)
        assert stacks_of(student)["layers.0.mlp.experts.gate_up_proj"].shared == "reduce"
        found = [one for one in student.factorization.shared_inputs if one.linears[0].endswith("experts.gate_up_proj")]
        assert {(one.linears[0].split(".")[1], one.side) for one in found} == {
            (layer, side) for layer in "01" for side in ("reduce", "expand")
        }
        for one in found:
            assert one.shared <= (one.together < one.separate)

    def test_never_leaves_each_expert_both_sides(self):
        teacher = tiny("mixtral")
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.4), solver="svd", share_input="never")
        assert {stack.shared for stack in stacks_of(student).values()} == {""}
        assert student.factorization.shared_inputs == ()

    def test_always_gives_all_experts_of_a_layer_one_a(self):
        teacher = tiny("mixtral")
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.4), solver="svd", share_input="always")
        assert {stack.shared for stack in stacks_of(student).values()} == {"reduce"}

    @pytest.mark.parametrize("solver", ["svd", "fisher", "whitened", "two_sided", "regression"])
    def test_sharing_where_it_loses_less_loses_less(self, solver):
        teacher, inputs = tiny("mixtral"), [batch(tiny("mixtral"), seed=seed) for seed in range(4)]

        def lost(share_input):
            student = makd.factorize(
                teacher, makd.Budget(keep_linears=0.4), solver=solver, calibration=inputs, share_input=share_input
            )
            return {name: e for name, e in student.factorization.errors.items() if "experts" in name}

        never, auto = lost("never"), lost("auto")
        assert never.keys() == auto.keys()
        assert sum(auto.values()) <= sum(never.values()) * 1.05


class TestFewTokens:
    @pytest.mark.parametrize(("name", "solver"), [("mixtral", "whitened"), *((name, "auto") for name in MIXTURES)])
    def test_experts_that_get_a_few_tokens_or_none_are_finite_and_run(self, name, solver):
        teacher = tiny(name)
        few = {key: value[:1, :3] for key, value in batch(teacher, padded=False).items()}
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver=solver, calibration=[few])
        assert all(bool(parameter.isfinite().all()) for parameter in student.parameters())
        other = batch(teacher, seed=3)
        assert bool(student(**other)[0].isfinite().all())

    def test_an_expert_without_tokens_is_fitted_to_the_layers(self):
        """It keeps more of what the layer reads than a plain decomposition of the same rank would."""
        teacher = tiny("mixtral")
        few = {key: value[:1, :2] for key, value in batch(teacher, padded=False).items()}
        student = makd.factorize(
            teacher, makd.Budget(keep_linears=0.4), solver="whitened", calibration=[few], share_input="never"
        )
        inputs = batch(teacher, padded=False, seed=1)
        assert distance(student, teacher, inputs) < 1.5


class TestSettings:
    def test_dense_experts_are_left_alone(self):
        teacher = tiny("mixtral")
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.95), solver="svd", experts="dense")
        assert not stacks_of(student)
        assert any(isinstance(module, LowRankLinear) for module in student.modules())

    def test_experts_that_are_not_there_cannot_be_factored(self):
        with pytest.raises(SettingError, match=r"factorize\.experts is factored, but the model has none"):
            makd.factorize(tiny("llama"), makd.Budget(keep_linears=0.5), solver="svd", experts="factored")

    def test_another_word_is_refused(self):
        with pytest.raises(SettingError, match=r"factorize\.experts is auto, factored or dense; got 'some'"):
            FactorizeConfig(experts="some")

    def test_experts_of_a_streamed_model_cannot_be_factored(self):
        with pytest.raises(SettingError, match="streamed model stay dense"):
            check_streamable(FactorizeConfig(experts="factored"))


def test_experts_get_factors_where_all_other_linears_stay_dense():
    student = makd.factorize(tiny("qwen2_moe"), makd.Budget(keep=0.8), solver="svd", share_input="never")
    assert student.factorization.ranks.keys() <= stacks_of(student).keys()


def test_a_layer_with_experts_may_be_dropped():
    teacher = tiny("mixtral", num_hidden_layers=3)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.4), calibration=[batch(teacher)], depth=2)
    assert len(student.factorization.dropped) == 1
    assert len(stacks_of(student)) == 4


def test_the_same_call_gives_the_same_student():
    teacher = tiny("qwen2_moe")
    one, two = (makd.factorize(teacher, makd.Budget(keep_linears=0.5), calibration=[batch(teacher)]) for _ in range(2))
    assert all(torch.equal(two.state_dict()[key], value) for key, value in one.state_dict().items())


def test_a_teacher_in_bfloat16_gives_a_student_in_bfloat16():
    teacher = tiny("mixtral").to(torch.bfloat16)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), calibration=[batch(teacher)])
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert bool(student(**batch(teacher))[0].isfinite().all())


def test_learning_brings_experts_nearer_to_the_teachers():
    teacher = tiny("qwen2_moe")
    inputs = batch(teacher)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), calibration=[inputs])
    experts = [parameter for stack in stacks_of(student).values() for parameter in stack.parameters()]
    before = distance(student, teacher, inputs)
    optimizer = torch.optim.Adam(experts, lr=1e-3)
    with torch.no_grad():
        expected = teacher(**inputs)[0]
    real = inputs["attention_mask"].bool()
    for _ in range(20):
        optimizer.zero_grad()
        (student(**inputs)[0] - expected)[real].square().mean().backward()
        optimizer.step()
    assert distance(student, teacher, inputs) < 0.95 * before


def test_a_streamed_student_is_the_one_whose_experts_are_dense(tmp_path):
    teacher = tiny("qwen3_moe_mixed", "causal_lm")
    teacher.save_pretrained(tmp_path / "teacher", save_original_format=False)
    rows, budget = [batch(teacher, seed=seed) for seed in range(3)], makd.Budget(keep_linears=0.9)
    empty, files = load_empty_model(str(tmp_path / "teacher"), "auto", torch.float32)
    (tmp_path / "student").mkdir()
    stream_student(empty, files, budget, FactorizeConfig(), Work(tmp_path / "work"), tmp_path / "student", rows)
    makd.factorize(teacher, budget, calibration=rows, experts="dense").save_pretrained(tmp_path / "expected")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
