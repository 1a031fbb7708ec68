"""Teacher, budget and calibration text -> student."""

import logging

import pytest
import torch

import makd
from makd.anatomy import resolve
from makd.student.linear import LowRankLinear
from tests.models import batch, tiny


def budget(keep=0.5):
    return makd.Budget(keep_linears=keep)


def test_the_teacher_is_not_changed():
    teacher = tiny("bert")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    makd.factorize(teacher, budget(), calibration=[batch(teacher)])
    assert teacher.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not hasattr(teacher.config, "quantization_config")


@pytest.mark.parametrize("kind", ["bert", "llama", "mixtral"])
def test_all_of_a_student_may_learn_and_a_frozen_teacher_stays_frozen(kind):
    teacher = tiny(kind).requires_grad_(False)
    student = makd.factorize(teacher, budget(), calibration=[batch(teacher)])
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_budget_of_everything_gives_back_the_teacher():
    teacher = tiny("bert")
    student = makd.factorize(teacher, budget(1.0), solver="svd")
    assert makd.fingerprint(student) == makd.fingerprint(teacher)
    assert len(student.factorization.dense) == len(resolve(teacher).linears)


def test_the_report_says_what_happened_to_every_linear():
    teacher = tiny("bert")
    report = makd.factorize(teacher, budget(0.7), calibration=[batch(teacher)]).factorization
    assert sorted([*report.ranks, *report.dense]) == sorted(resolve(teacher).linears)
    assert all(0 <= error <= 1 for error in report.errors.values())


def test_whitened_factors_follow_the_calibration_text_better_than_plain_svd():
    teacher = tiny("bert")
    inputs = batch(teacher)
    whitened = makd.factorize(teacher, budget(), solver="whitened", calibration=[inputs])
    plain = makd.factorize(teacher, budget(), solver="svd")
    assert makd.fidelity(whitened, teacher, [inputs])["cosine"] > makd.fidelity(plain, teacher, [inputs])["cosine"]


def test_padding_in_the_calibration_text_does_not_count():
    teacher = tiny("bert")
    inputs = batch(teacher, padded=True)
    changed = {**inputs, "input_ids": torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 9)}
    one, two = (makd.factorize(teacher, budget(), calibration=[rows]) for rows in (inputs, changed))
    for name in one.factorization.ranks:
        torch.testing.assert_close(
            one.get_submodule(name).dense_weight(), two.get_submodule(name).dense_weight(), rtol=1e-3, atol=1e-5
        )


def test_fewer_tokens_than_dimensions_are_handled_and_said_in_one_line(caplog):
    teacher = tiny("bert")
    inputs = {name: value[:1, :5] for name, value in batch(teacher, padded=False).items()}
    with caplog.at_level(logging.WARNING, logger="makd"):
        student = makd.factorize(teacher, budget(), solver="whitened", calibration=[inputs])
    assert len(student.factorization.fallbacks) > 1
    (line,) = caplog.messages
    assert line.startswith("The calibration text has 5 tokens, fewer than the 64 features that encoder.layer.0.output")
    assert "and 11 more linears" in line
    assert "Give more text" in line
    assert all(torch.isfinite(parameter).all() for parameter in student.parameters())


def much_text(teacher):
    return [batch(teacher, seed=seed) for seed in range(8)]


def test_inputs_that_a_norm_keeps_from_some_direction_are_no_reason_to_warn(caplog):
    teacher = tiny("bert")  # behind its LayerNorms, what linears read sums to a constant
    with caplog.at_level(logging.WARNING, logger="makd"):
        student = makd.factorize(
            teacher, budget(), solver="whitened", calibration=[batch(teacher, seed=seed) for seed in range(8)]
        )
    assert any("behind a norm" in told for told in student.factorization.fallbacks.values())
    assert not caplog.messages


def test_linears_that_saw_nothing_but_zeros_are_told_with_what_to_do(caplog):
    teacher = tiny("bert")
    norm = teacher.encoder.layer[0].attention.output.LayerNorm
    with torch.no_grad():
        norm.weight.zero_(), norm.bias.zero_()
    with caplog.at_level(logging.WARNING, logger="makd"):
        makd.factorize(
            teacher, budget(), solver="whitened", calibration=[batch(teacher, seed=seed) for seed in range(8)]
        )
    (line,) = caplog.messages
    assert line.startswith("encoder.layer.0.intermediate.dense")
    assert "Give text that reaches them" in line


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_student_has_the_teachers_dtype(dtype):
    teacher = tiny("llama").to(dtype)
    student = makd.factorize(teacher, budget(), solver="svd")
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}


def test_a_conv1d_is_factorized_with_its_bias():
    teacher = tiny("gpt2")
    torch.nn.init.normal_(teacher.h[0].attn.c_attn.bias)
    student = makd.factorize(teacher, budget(0.9), solver="svd")
    layer = student.h[0].attn.c_attn
    assert isinstance(layer, LowRankLinear)
    assert torch.equal(layer.bias, teacher.h[0].attn.c_attn.bias)
    close = torch.dist(layer.dense_weight(), teacher.h[0].attn.c_attn.weight.T)
    assert close < teacher.h[0].attn.c_attn.weight.norm()


def test_nan_in_the_weights_is_refused_by_name():
    teacher = tiny("bert")
    teacher.encoder.layer[0].output.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(makd.MakdError, match=r"encoder\.layer\.0\.output\.dense\.weight holds NaN"):
        makd.factorize(teacher, budget(), solver="svd")


def test_nan_in_the_activations_is_refused_by_name():
    teacher = tiny("bert")
    model_inputs = batch(teacher)

    def poison(_module, _inputs, output):
        return output * float("inf")

    with (
        teacher.embeddings.register_forward_hook(poison),
        pytest.raises(makd.MakdError, match=r"enter encoder\.layer\.0 hold NaN"),
    ):
        makd.factorize(teacher, budget(), calibration=[model_inputs])


def test_missing_calibration_is_refused_with_the_way_out():
    with pytest.raises(makd.MakdError, match="'svd', which needs none"):
        makd.factorize(tiny("bert"), budget())


def test_empty_calibration_is_refused():
    with pytest.raises(makd.MakdError, match="at least one batch"):
        makd.factorize(tiny("bert"), budget(), calibration=[])


def test_a_batch_of_padding_only_is_refused():
    teacher = tiny("bert")
    inputs = batch(teacher)
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    with pytest.raises(makd.MakdError, match="all padding"):
        makd.factorize(teacher, budget(), calibration=[inputs])


def test_a_student_is_not_factorized_again():
    student = makd.factorize(tiny("bert"), budget(), solver="svd")
    with pytest.raises(makd.MakdError, match="factored already"):
        makd.factorize(student, budget(), solver="svd")


@pytest.mark.parametrize(
    ("setting", "near"), [({"solver": "whitend"}, "'whitened'"), ({"ranks": "unifrm"}, "'uniform'")]
)
def test_an_unknown_name_offers_the_nearest(setting, near):
    with pytest.raises(makd.MakdError, match=near):
        makd.factorize(tiny("bert"), budget(), **setting)


def test_shared_layers_are_factorized_once_and_counted_once():
    teacher = tiny("albert")
    student = makd.factorize(teacher, makd.Budget(keep=0.8), solver="svd")
    assert sum(p.numel() for p in student.parameters()) <= 0.8 * sum(p.numel() for p in teacher.parameters())


def test_ranks_follow_the_solver_unless_they_are_given():
    assert makd.FactorizeConfig(solver="two_sided").rank_rule == "global"
    assert makd.FactorizeConfig(solver="whitened").rank_rule == "uniform"
    assert makd.FactorizeConfig(solver="whitened", ranks="energy").rank_rule == "energy"
