"""Which parameters learn: all, the linears', or adapters, which are merged into the factors afterwards."""

import copy

import pytest
import torch

import makd
from makd.distill import TrainingConfig, learning
from makd.errors import SettingError
from tests.distill.test_trainer import make_pair, make_rows, same_weights, train
from tests.models import batch, tiny

ADAPTERS = TrainingConfig(trainable="adapters", adapter_rank=2)
SEED = 0


def learners(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def student():
    return make_pair("llama", "causal_lm")[1]


def test_all_parameters_learn_by_default(student):
    with learning(student, TrainingConfig(), SEED):
        assert learners(student) == {name for name, _ in student.named_parameters()}


def test_only_the_linears_learn_where_that_is_asked(student):
    with learning(student, TrainingConfig(trainable="linears"), SEED):
        assert learners(student) == {name for name, _ in student.named_parameters() if ".layers." in name and
                                     "norm" not in name}  # fmt: skip
    assert learners(student) == {name for name, _ in student.named_parameters()}


@pytest.mark.parametrize("trainable", ["all", "linears", "adapters"])
def test_what_learns_does_not_depend_on_what_was_frozen_before(student, trainable):
    training = TrainingConfig(trainable=trainable, adapter_rank=2)
    expected = inside(copy.deepcopy(student), training)
    assert inside(student.requires_grad_(False), training) == expected


def inside(model, training):
    with learning(model, training, SEED):
        return learners(model)


@pytest.mark.parametrize("trainable", ["all", "linears", "adapters"])
def test_everything_may_learn_after_an_error_inside(student, trainable):
    with pytest.raises(KeyboardInterrupt), learning(student, TrainingConfig(trainable=trainable, adapter_rank=2), SEED):
        raise KeyboardInterrupt
    assert learners(student) == {name for name, _ in student.named_parameters()}


def test_only_adapters_learn_and_one_stands_on_every_factor(student):
    factors = {name.removesuffix(".weight") for name, _ in student.named_parameters() if "reduce" in name or
               "expand" in name}  # fmt: skip
    with learning(student, ADAPTERS, SEED):
        found = learners(student)
        assert {name.split(".lora_")[0] for name in found} == factors
        assert all(parameter.shape[0] == 2 for name, parameter in student.named_parameters() if "lora_A" in name)


def drawn(student, seed, stage=1):
    """The adapters that a student gets."""
    with learning(student, ADAPTERS, seed, stage):
        return [parameter.detach().clone() for name, parameter in student.named_parameters() if "lora_A" in name]


def equal(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_adapters_are_those_of_the_seed_and_the_stage_whatever_was_drawn_before(student):
    torch.manual_seed(1)
    first = drawn(student, SEED)
    torch.rand(3)
    assert equal(first, drawn(student, SEED))
    assert not equal(first, drawn(student, SEED + 1))
    assert not equal(first, drawn(student, SEED, stage=2))


def test_drawing_adapters_leaves_the_random_state_as_it_was(student):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    drawn(student, SEED)
    assert torch.equal(torch.rand(3), expected)


def test_adapters_that_learned_nothing_leave_the_student_as_it_was(student):
    before, names = copy.deepcopy(student), [name for name, _ in student.named_parameters()]
    with learning(student, ADAPTERS, SEED):
        pass
    assert [name for name, _ in student.named_parameters()] == names
    assert same_weights(student, before)


def test_merged_adapters_give_what_the_student_gave_with_them(student):
    inputs = batch(student)
    with learning(student, ADAPTERS, SEED), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        expected = student(**inputs).logits
    assert not any("lora" in name for name, _ in student.named_modules())
    with torch.no_grad():
        assert torch.allclose(student(**inputs).logits, expected, atol=1e-5)


def test_linears_that_share_an_input_get_one_adapter_on_their_common_factor():
    teacher = tiny("llama", head="causal_lm")
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.4), solver="svd", share_input="always")
    expected = student(**batch(student)).logits
    with learning(student, ADAPTERS, SEED):
        on_first = [name for name in learners(student) if ".layers.0." in name and "reduce.lora_A" in name]
        assert len(on_first) < 7
    assert torch.equal(student(**batch(student)).logits, expected)


def test_a_student_learns_by_adapters_and_is_saved_as_any_other(tmp_path):
    teacher, student = make_pair()
    before = copy.deepcopy(student)
    with learning(student, ADAPTERS, SEED):
        trainer = train(tmp_path / "run", student, teacher, max_steps=20)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    embeddings = "embeddings.word_embeddings.weight"
    assert torch.equal(student.state_dict()[embeddings], before.state_dict()[embeddings])
    student.eval().save_pretrained(tmp_path / "student")
    assert same_weights(type(student).from_pretrained(tmp_path / "student"), student)


def test_a_cut_run_resumes_to_the_same_student(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    found = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        teacher, student = make_pair()
        with learning(student, ADAPTERS, SEED):
            trainer = makd.DistillTrainer(
                student, teacher, args=arguments(tmp_path / "run", **settings), train_dataset=make_rows()
            )
            trainer.train(resume_from_checkpoint=resume)
        found.append(student)
    assert same_weights(*found)


def arguments(folder, **settings):
    from tests.distill.test_trainer import make_arguments

    return make_arguments(folder, **settings)


def test_an_error_inside_takes_the_adapters_off_unmerged(student):
    before = copy.deepcopy(student)
    with pytest.raises(ValueError, match="inside"), learning(student, ADAPTERS, SEED):
        raise ValueError("inside")
    assert same_weights(student, before)


def test_a_model_without_factors_has_no_place_for_adapters():
    with pytest.raises(SettingError, match="has no factors"), learning(tiny("bert"), ADAPTERS, SEED):
        pass


def test_factors_of_experts_learn_with_the_linears_and_are_told_of_with_adapters(caplog):
    student = make_pair("mixtral", "causal_lm")[1]
    with learning(student, TrainingConfig(trainable="linears"), SEED):
        found = learners(student)
        assert any(".experts." in name for name in found)
        assert not any("norm" in name or "embed" in name for name in found)
    with learning(student, ADAPTERS, SEED):
        assert "those of experts stay as they are" in caplog.text
