"""Losses that are made during the student's forward are those of whole recordings, and let go of the teacher."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

import makd
from makd.aspects import attention_kl, normalised_mse
from makd.capture import AttentionCall, capture
from makd.distill import DistillTrainer
from makd.distill.distillation_forward import DistillationForward
from makd.distill.losses.counted import TokenMasks
from makd.distill.losses.layers import LayerLosses, _score_mask, compare_calls
from tests.distill.test_trainer import make_arguments, make_pair, make_rows
from tests.models import batch

PLAN = makd.Plan(
    terms=(
        makd.Term(aspect="matrix", weight=2.0),
        makd.Term(aspect="matrix", layers="last", roles=("q", "down")),
        makd.Term(aspect="hidden"),
        makd.Term(aspect="attention", weight=3.0),
    )
)
MODELS = [
    ("bert", "base"),
    ("llama", "causal_lm"),
    ("gpt2", "causal_lm"),
    ("t5", "seq2seq_lm"),
    ("gemma2", "causal_lm"),
]
CASES = [
    *((*model, checkpointing) for model in MODELS for checkpointing in (False, True)),
    ("opt", "causal_lm", False),  # joins rows before its feed-forward; checkpointed: the next test
    ("albert", "base", False),  # shares its layers; does not know checkpointing
]


def make_trainer(folder, name="bert", head="base", plan=PLAN, double=True, **settings):
    teacher, student = make_pair(name, head)
    if double:
        teacher.double(), student.double()
    return DistillTrainer(student, teacher, plan, args=make_arguments(folder, **settings), train_dataset=make_rows())


def unreduced(trainer, inputs):
    """The plan's sum from two whole recordings, in plain operations."""
    with torch.no_grad(), capture(trainer.teacher, trainer.teacher_anatomy, trainer.plan.taps) as theirs:
        trainer.teacher(**inputs)
    with capture(trainer.model, trainer.anatomy, trainer.plan.taps) as ours:
        trainer.model(**inputs)
    tokens = TokenMasks(trainer.anatomy, inputs).real
    total = 0.0
    for active in trainer.plan.terms:
        parts = []
        for tap in active.taps:
            real = tokens(tap)[0]
            if tap in ours.tensors:
                student, teacher = (side.tensors[tap].reshape(*real.shape, -1)[real] for side in (ours, theirs))
                parts.append((student - teacher).square().mean() / teacher.var(0, correction=0).mean())
            else:
                s, t = ours.attention[tap], theirs.attention[tap]
                kl = attention_kl(
                    t.query, t.key, s.query, s.key, _score_mask(t), t.is_causal, t.scale,
                    attention_mask_student=None if s.position_bias is None else _score_mask(s),
                    softcap=t.softcap, method="tiles",
                )  # fmt: skip
                parts.append(kl.transpose(1, 2)[real].mean())
        total = total + active.term.weight * torch.stack(parts).mean()
    return total


def gradients(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: slope for name, slope in zip(names, found, strict=True) if slope is not None}


@pytest.mark.parametrize(("name", "head", "checkpointing"), CASES)
def test_value_and_gradient_are_those_of_whole_recordings(name, head, checkpointing, tmp_path):
    trainer = make_trainer(tmp_path, name, head)
    inputs = batch(trainer.model)
    trainer.model.eval()
    expected = unreduced(trainer, inputs)
    wanted = gradients(expected, trainer.model)
    if checkpointing:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    loss = trainer.compute_loss(trainer.model.train(), dict(inputs))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    found = gradients(loss, trainer.model)
    assert found.keys() == wanted.keys()
    for parameter, slope in found.items():
        torch.testing.assert_close(slope, wanted[parameter], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(("name", "head"), [("opt", "causal_lm"), ("bart", "seq2seq_lm")])
def test_dropout_that_a_checkpointed_layer_draws_itself_is_off_in_a_step(name, head, tmp_path):
    trainer = make_trainer(tmp_path, name, head)
    assert trainer.model.config.dropout > 0
    inputs = batch(trainer.model)
    trainer.model.eval()
    expected = unreduced(trainer, inputs)
    wanted = gradients(expected, trainer.model)
    trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    trainer.current_gradient_accumulation_steps = 1  # which `train` sets
    loss = trainer.training_step(trainer.model, dict(inputs))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-12)
    for parameter, slope in wanted.items():
        torch.testing.assert_close(trainer.model.get_parameter(parameter).grad, slope, rtol=1e-7, atol=1e-10)
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_steps_add_up_to_the_sum_of_their_gradients(checkpointing, tmp_path):
    trainer = make_trainer(tmp_path)
    parts = [{name: value[row : row + 2] for name, value in batch(trainer.model).items()} for row in (0, 2)]
    trainer.model.eval()
    wanted = gradients(sum(unreduced(trainer, part) for part in parts) / 2, trainer.model)
    if checkpointing:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    for part in parts:
        (trainer.compute_loss(trainer.model.train(), dict(part)) / 2).backward()
    for name, slope in wanted.items():
        torch.testing.assert_close(trainer.model.get_parameter(name).grad, slope, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_teachers_tensors_die_while_the_students_forward_runs(checkpointing, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    if checkpointing:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    alive, seen = {}, []
    teacher_forward = DistillationForward.teacher_forward

    def noting(forward, inputs, rows):
        theirs, *rest = teacher_forward(forward, inputs, rows)
        alive.update({tap: weakref.ref(tensor) for tap, tensor in theirs.tensors.items() if tap.kind == "linear"})
        return theirs, *rest

    def count(*_):
        gc.collect()
        seen.append(sum(reference() is not None for reference in alive.values()))

    monkeypatch.setattr(DistillationForward, "teacher_forward", noting)
    for layer in trainer.anatomy.layers:
        trainer.model.get_submodule(layer.module).register_forward_hook(count)
    trainer.compute_loss(trainer.model.train(), dict(batch(trainer.model)))
    assert seen == [len(alive) // 2, 0]


def saved_elements(trainer, inputs):
    """Elements of the distinct tensors that wait for the backward."""
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model.train(), dict(inputs))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    return sum(tensor.numel() for place, tensor in kept.items() if place not in parameters), loss


def test_gradient_checkpointing_goes_on_saving(tmp_path):
    trainer = make_trainer(tmp_path)
    inputs = batch(trainer.model)
    whole, _ = saved_elements(trainer, inputs)
    trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    layers, _ = saved_elements(trainer, inputs)
    assert layers < whole / 2


def test_a_window_hides_the_keys_that_a_mask_of_it_hides():
    generator = torch.Generator().manual_seed(0)
    theirs, ours = (
        AttentionCall(
            *(torch.randn(2, heads, 9, 4, generator=generator) for heads in (4, 2)), None, True, 0.5, None, None
        )
        for _ in range(2)
    )
    away = torch.arange(9)[:, None] - torch.arange(9)
    padding = torch.arange(9) < torch.tensor([[9], [6]])
    near = (away.abs() < 3)[None, None]
    for mask, whole in ((None, near), (padding, near & padding[:, None, None])):
        real = None if mask is None else padding
        by_window = compare_calls(theirs, replace(ours, mask=mask, window=3), real)
        torch.testing.assert_close(by_window, compare_calls(theirs, replace(ours, mask=whole), real))
        assert not torch.isclose(by_window, compare_calls(theirs, replace(ours, mask=mask), real))


def test_a_plan_s_tap_that_two_terms_share_is_compared_once(tmp_path):
    trainer = make_trainer(tmp_path)
    inputs = batch(trainer.model)
    theirs, *_ = trainer.distillation_forward.teacher_forward(inputs, None)
    layers = LayerLosses(trainer.anatomy, inputs, theirs, trainer.plan)
    with capture(trainer.model, trainer.anatomy, trainer.plan.taps, layers.receive) as empty:
        trainer.model(**inputs)
    assert layers.keys() == set(trainer.plan.comparisons)
    assert all(not found for found in (empty.tensors, empty.attention, theirs.tensors, theirs.attention))


def test_padding_does_not_change_the_loss(tmp_path):
    trainer = make_trainer(tmp_path)
    inputs = {name: value[:1, :9] for name, value in batch(trainer.model).items()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    padded = {name: torch.nn.functional.pad(value, (0, 4)) for name, value in inputs.items()}
    one, other = (trainer.compute_loss(trainer.model.train(), dict(given)) for given in (inputs, padded))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


def test_mean_squares_without_a_mask_are_those_with_one_that_is_all_true():
    student, teacher = (torch.randn(2, 5, 3, dtype=torch.float64) for _ in range(2))
    everywhere = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(normalised_mse(student, teacher, None), normalised_mse(student, teacher, everywhere))
