"""What holds for every architecture that makd knows: factorize, capture, mimic, save, reload."""

import copy

import pytest
import torch

import makd
from makd.anatomy import Role, resolve
from makd.aspects import activate
from makd.capture import Tap, capture, examine
from makd.distill import aspect_losses
from makd.distill.losses.layers import LayerLosses
from makd.student.linear import LowRankLinear
from tests.distill.test_trainer import make_arguments
from tests.models import MIXTURES, RELATIVES, TINY, batch, tiny

FULL = makd.Plan(preset="full")


def losses_between(teacher, student, inputs, plan=FULL):
    anatomy = examine(student)
    active = activate(plan, anatomy)
    with torch.no_grad(), capture(teacher, examine(teacher), active.teacher_taps) as theirs:
        teacher_output = teacher(**inputs)
    layers = LayerLosses(anatomy, inputs, theirs, active)
    with capture(student, anatomy, active.taps, layers.receive):
        student_output = student(**inputs)
    return active, aspect_losses(active, anatomy, inputs, layers, teacher_output, student_output)


def factors_that_a_step_leaves(student, teacher, folder):
    """Names of the factored linears whose first factor is, after one step of the default plan, what it was."""
    factors = {name: module.reduce for name, module in student.named_modules() if isinstance(module, LowRankLinear)}
    before = {name: factor.weight.clone() for name, factor in factors.items()}
    inputs = batch(teacher)
    rows = [{key: value[row] for key, value in inputs.items()} for row in range(len(inputs["input_ids"]))]
    arguments = make_arguments(folder, max_steps=1, remove_unused_columns=False)
    makd.DistillTrainer(student, teacher, args=arguments, train_dataset=rows).train()
    return [name for name, factor in factors.items() if torch.equal(factor.weight, before[name])]


@pytest.mark.parametrize("name", [*TINY, *MIXTURES])
class TestEveryFamily:
    def test_every_loss_is_zero_when_the_student_equals_the_teacher(self, name):
        teacher = tiny(name)
        active, losses = losses_between(teacher, copy.deepcopy(teacher), batch(teacher))
        assert losses.keys() == {item.name for item in active.terms}
        for aspect, loss in losses.items():
            assert abs(loss.item()) <= 1e-6, aspect

    def test_every_loss_is_positive_for_a_smaller_student(self, name):
        teacher = tiny(name)
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), calibration=[batch(teacher)])
        _, losses = losses_between(teacher, student, batch(teacher))
        assert all(loss.item() > 0 for loss in losses.values()), losses

    def test_what_stands_in_the_padding_changes_no_loss(self, name):
        teacher = tiny(name)
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")
        inputs = batch(teacher, padded=True)
        changed = dict(inputs)
        for ids, mask in (("input_ids", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask")):
            if ids in inputs:
                changed[ids] = torch.where(inputs[mask].bool(), inputs[ids], 7)
                assert not torch.equal(changed[ids], inputs[ids])
        _, before = losses_between(teacher, student, inputs)
        _, after = losses_between(teacher, student, changed)
        for aspect in before:
            torch.testing.assert_close(after[aspect], before[aspect], rtol=1e-5, atol=1e-7)

    def test_a_step_of_the_default_plan_reaches_every_factor_and_not_the_teacher(self, name, tmp_path):
        teacher = tiny(name)
        before = copy.deepcopy(teacher.state_dict())
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd").train(False)
        assert factors_that_a_step_leaves(student, teacher, tmp_path) == []
        assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())

    def test_the_saved_student_reloads_bit_for_bit(self, name, tmp_path):
        teacher = tiny(name)
        student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")
        student.save_pretrained(tmp_path)
        again = type(student).from_pretrained(tmp_path)
        assert {k: v.shape for k, v in again.state_dict().items()} == {
            k: v.shape for k, v in student.state_dict().items()
        }
        for key, value in student.state_dict().items():
            assert torch.equal(again.state_dict()[key], value), key
        assert makd.fingerprint(again) == makd.fingerprint(student)

    def test_the_budget_is_met_exactly(self, name):
        teacher = tiny(name)
        total = sum(parameter.numel() for parameter in teacher.parameters())
        student = makd.factorize(teacher, makd.Budget(keep=0.8), solver="svd")
        found = sum(parameter.numel() for parameter in student.parameters())
        anatomy = resolve(teacher)
        smallest_step = min(sum(teacher.get_submodule(linear).weight.shape) for linear in anatomy.linears)
        # a rank more for all experts of a layer is a larger step
        steps = [stack.experts * (stack.out_features + stack.in_features) for stack in anatomy.stacks]
        assert 0.8 * total - max([smallest_step, *steps]) <= found <= 0.8 * total


@pytest.mark.parametrize("name", RELATIVES)
def test_every_relative_is_factored_by_the_default_solver_taught_saved_and_reloaded(name, tmp_path):
    teacher, inputs = tiny(name), batch(tiny(name))
    needs_svd = "inputs" in examine(teacher).solvers_off
    settings = {"solver": "svd"} if needs_svd else {"calibration": [inputs]}
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), **settings).train(False)
    before, after = (sum(map(torch.numel, model.parameters())) for model in (teacher, student))
    assert after < before

    _, losses = losses_between(teacher, student, inputs)
    assert all(loss.item() > 0 for loss in losses.values()), losses
    assert factors_that_a_step_leaves(student, teacher, tmp_path / "training") == []

    student.save_pretrained(tmp_path / "student")
    assert makd.fingerprint(type(student).from_pretrained(tmp_path / "student")) == makd.fingerprint(student)


def test_attention_is_captured_with_the_rotary_position_in_it():
    model = tiny("llama")
    anatomy = resolve(model)
    taps = (Tap(0, "attention"), Tap(0, "linear", Role.QUERY))
    with capture(model, anatomy, taps) as recording, torch.no_grad():
        model(**batch(model, padded=False))
    projected = recording.tensors[taps[1]]
    query = recording.attention[taps[0]].query
    assert query.shape[2] == projected.shape[1]
    flat = query.transpose(1, 2).flatten(2)
    torch.testing.assert_close(flat[:, 0], projected[:, 0])  # position 0 is not rotated
    assert not torch.allclose(flat[:, 3], projected[:, 3])


def test_capturing_leaves_the_implementation_and_the_output_as_they_are():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny("bert")
    inputs = batch(model)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with torch.no_grad():
        expected = model(**inputs)[0]
        with capture(model, resolve(model), (Tap(0, "attention"),)):
            assert model.config._attn_implementation == "sdpa"
            captured = model(**inputs)[0]
    assert torch.equal(captured, expected)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_hooks_are_gone_after_an_error_inside_the_block():
    model = tiny("bert")
    anatomy = resolve(model)
    taps = (Tap(0, "hidden"), Tap(0, "attention"), Tap(0, "linear", Role.UP))
    with pytest.raises(RuntimeError, match="stop"), capture(model, anatomy, taps):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())


def test_eager_attention_can_be_captured_too():
    model = tiny("bert")
    model.set_attn_implementation("eager")
    teacher = copy.deepcopy(model)
    _, losses = losses_between(teacher, model, batch(model))
    assert losses["attention"].item() <= 1e-6
