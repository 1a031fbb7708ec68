"""The Trainer with a plan's loss: what it optimises, logs, resumes, and leaves alone."""

import copy
import logging

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainingArguments

import makd
from makd.distill import DistillTrainer
from makd.errors import SettingError
from tests.models import batch, tiny


def make_rows(count=16, length=12, labels=None):
    ids = torch.randint(5, 60, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    rows = {"input_ids": ids, "attention_mask": [[1] * length] * count}
    if labels is not None:
        rows["labels"] = labels
    return Dataset.from_dict(rows)


def make_pair(name="bert", head="base"):
    teacher = tiny(name, head=head)
    return teacher, makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")


def make_arguments(folder, **settings):
    defaults = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return TrainingArguments(**{**defaults, **settings})


def train(folder, student=None, teacher=None, plan="full", rows=None, trainer_settings=None, **settings):
    if student is None:
        teacher, student = make_pair()
    trainer = DistillTrainer(
        model=student,
        teacher=teacher,
        plan=plan,
        args=make_arguments(folder, **settings),
        train_dataset=rows or make_rows(),
        **(trainer_settings or {}),
    )
    trainer.train(resume_from_checkpoint=settings.pop("resume", None))
    return trainer


def same_weights(one, other):
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_training_brings_the_student_nearer_to_the_teacher(tmp_path):
    teacher, student = make_pair()
    before = makd.fidelity(student, teacher, [batch(teacher)])["cosine"]
    train(tmp_path, student, teacher, max_steps=60, learning_rate=5e-3)
    assert makd.fidelity(student, teacher, [batch(teacher)])["cosine"] > before


def test_each_aspect_is_logged_apart(tmp_path):
    log = train(tmp_path).state.log_history[0]
    assert {"loss", "matrix", "hidden", "attention", "embedding"} <= log.keys()
    plan_sum = log["matrix"] + log["hidden"] + log["attention"] + 10 * log["embedding"]
    assert log["loss"] == pytest.approx(plan_sum, rel=1e-4)


def test_the_teacher_stays_frozen_in_eval_mode_and_out_of_the_optimizer(tmp_path):
    teacher, student = make_pair()
    before = copy.deepcopy(teacher.state_dict())
    trainer = train(tmp_path, student, teacher.train())
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    optimized = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert optimized == sum(p.numel() for p in student.parameters())


def test_how_much_of_a_student_learns_is_told_where_some_of_it_is_frozen(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="makd")
    teacher, student = make_pair()
    makd.DistillTrainer(student, teacher, args=make_arguments(tmp_path))
    assert "parameters learn" not in caplog.text
    student.embeddings.requires_grad_(False)
    total = sum(parameter.numel() for parameter in student.parameters())
    learning = total - sum(parameter.numel() for parameter in student.embeddings.parameters())
    makd.DistillTrainer(student, teacher, args=make_arguments(tmp_path))
    assert f"{learning:,} of the student's {total:,} parameters learn" in caplog.text


def test_the_same_seed_gives_the_same_student(tmp_path):
    assert same_weights(train(tmp_path / "a").model, train(tmp_path / "b").model)


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    whole = train(tmp_path / "whole", max_steps=6).model
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    train(tmp_path / "cut", trainer_settings={"callbacks": [Stop()]}, **settings)
    teacher, student = make_pair()
    trainer = DistillTrainer(
        model=student, teacher=teacher, args=make_arguments(tmp_path / "cut", **settings), train_dataset=make_rows()
    )
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert same_weights(whole, trainer.model)


def test_gradient_accumulation_does_not_change_the_first_step(tmp_path):
    """One step on 8 rows at once, and on the same 8 one at a time: the hidden aspect's norm aside, a mean is a mean."""
    plan = makd.Plan(terms=(makd.Term(aspect="embedding"), makd.Term(aspect="attention")))
    rows = make_rows(8)
    whole = train(tmp_path / "a", *make_pair()[::-1], plan=plan, rows=rows, max_steps=1, per_device_train_batch_size=8)
    parts = train(
        tmp_path / "b", *make_pair()[::-1], plan=plan, rows=rows, max_steps=1,
        per_device_train_batch_size=1, gradient_accumulation_steps=8,
    )  # fmt: skip
    one, other = whole.state.log_history[0], parts.state.log_history[0]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_gradient_checkpointing_does_not_change_the_gradient(tmp_path):
    plain = train(tmp_path / "a", max_steps=2)
    saving = train(tmp_path / "b", max_steps=2, activation_checkpointing=True)
    for one, other in zip(plain.state.log_history[:2], saving.state.log_history[:2], strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_reentrant_checkpointing_is_refused(tmp_path):
    with pytest.raises(makd.MakdError, match="use_reentrant"):
        train(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})


def test_bfloat16_autocast_trains_with_float32_parameters(tmp_path):
    trainer = train(tmp_path, bf16=True)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert trainer.state.log_history[0]["loss"] > 0


def test_evaluation_during_training_reports_every_aspect_without_labels(tmp_path):
    trainer = train(
        tmp_path, trainer_settings={"eval_dataset": make_rows(6)}, eval_strategy="steps", eval_steps=2
    )  # fmt: skip
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(found) == 2
    assert {"eval_matrix", "eval_hidden", "eval_attention", "eval_embedding"} <= found[0].keys()


def test_labelled_classification_adds_the_tasks_own_loss(tmp_path):
    teacher, student = make_pair("bert", "sequence_classification")
    trainer = train(tmp_path, student, teacher, rows=make_rows(labels=[0, 1] * 8))
    assert {"task", "logits", "matrix"} <= trainer.state.log_history[0].keys()


def test_without_labels_there_is_no_task_loss(tmp_path):
    teacher, student = make_pair("bert", "sequence_classification")
    log = train(tmp_path, student, teacher).state.log_history[0]
    assert "task" not in log
    assert "logits" in log


def test_a_causal_language_model_is_taught_from_its_own_tokens(tmp_path):
    teacher, student = make_pair("llama", "causal_lm")
    rows = make_rows()
    rows = rows.add_column("labels", rows["input_ids"])
    log = train(tmp_path, student, teacher, rows=rows).state.log_history[0]
    assert {"task", "logits", "matrix", "hidden", "attention"} <= log.keys()


def test_the_students_dropout_is_off_unless_asked_for(tmp_path):
    teacher, student = make_pair()
    assert teacher.config.hidden_dropout_prob > 0
    off = DistillTrainer(student, teacher, args=make_arguments(tmp_path), train_dataset=make_rows())
    on = DistillTrainer(student, teacher, "full", True, args=make_arguments(tmp_path), train_dataset=make_rows())
    inputs = batch(teacher)
    losses = [[t.compute_loss(student.train(), dict(inputs)).item() for _ in range(2)] for t in (off, on)]
    assert losses[0][0] == losses[0][1]
    assert losses[1][0] != losses[1][1]


def test_teacher_and_student_that_do_not_line_up_are_refused(tmp_path):
    _, student = make_pair()
    with pytest.raises(makd.MakdError, match="do not line up"):
        DistillTrainer(student, tiny("llama"), args=make_arguments(tmp_path), train_dataset=make_rows())


def test_a_teacher_that_gives_nan_stops_the_run_with_the_reason(tmp_path):
    teacher, student = make_pair()
    teacher.encoder.layer[0].output.dense.bias.data.fill_(float("nan"))
    with pytest.raises(makd.MakdError, match="not finite"):
        train(tmp_path, student, teacher)


@pytest.mark.parametrize("setting", ["label_smoothing_factor", "compute_loss_func"])
def test_what_the_trainer_does_with_a_loss_of_its_own_is_refused(setting, tmp_path):
    teacher, student = make_pair("bert", "sequence_classification")
    smoothing = {"label_smoothing_factor": 0.1} if setting.startswith("label") else {}
    own = {} if smoothing else {"compute_loss_func": lambda *_: None}
    with pytest.raises(SettingError, match=f"{setting} would do nothing"):
        makd.DistillTrainer(
            student, teacher, args=make_arguments(tmp_path, **smoothing), train_dataset=make_rows(), **own
        )


def test_losses_before_the_first_step_are_said_to_be_in_other_units(tmp_path, caplog):
    teacher, student = make_pair("bert", "base")
    trainer = makd.DistillTrainer(
        student, teacher, args=make_arguments(tmp_path), train_dataset=make_rows(), eval_dataset=make_rows()
    )
    trainer.evaluate()
    trainer.evaluate()
    assert caplog.text.count("Evaluated before the first step") == 1
    caplog.clear()
    trainer.train()
    trainer.evaluate()
    assert "before the first step" not in caplog.text
