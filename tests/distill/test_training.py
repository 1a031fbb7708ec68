"""The settings of a training, and what the Trainer is told of them."""

from dataclasses import fields

import pytest

from makd import TrainingConfig

TOLD = {
    "steps": (7, {"max_steps": 7}),
    "epochs": (2.5, {"num_train_epochs": 2.5}),
    "batch_size": (3, {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3}),
    "accumulate": (5, {"gradient_accumulation_steps": 5}),
    "learning_rate": (3e-3, {"learning_rate": 3e-3}),
    "warmup": (0.25, {"warmup_steps": 0.25}),
    "schedule": ("linear", {"lr_scheduler_type": "linear"}),
    "weight_decay": (0.2, {"weight_decay": 0.2}),
    "max_grad_norm": (0.5, {"max_grad_norm": 0.5}),
    "precision": ("bfloat16", {"bf16": True}),
    "gradient_checkpointing": (True, {"activation_checkpointing": True}),
    "log_every": (4, {"logging_steps": 4}),
    "evaluate_every": (6, {"eval_strategy": "steps", "eval_steps": 6}),
    "save_every": (9, {"save_strategy": "steps", "save_steps": 9}),
    "report_to": ("tensorboard", {"report_to": ["tensorboard"]}),
}
"""Setting -> another value than its default, and the Trainer's arguments with it."""
READ_ELSEWHERE = {"tokens_per_batch", "teacher_dtype", "student_dropout", "trainable", "adapter_rank", "shard_teacher"}
"""Settings that the Trainer has no argument for."""


def arguments(folder, **settings):
    return TrainingConfig(**settings).to_arguments(folder, seed=3, use_cpu=True)


def test_every_setting_is_told_to_the_trainer_or_read_elsewhere():
    assert {one.name for one in fields(TrainingConfig)} == TOLD.keys() | READ_ELSEWHERE


@pytest.mark.parametrize("name", TOLD)
def test_a_setting_is_the_trainers_argument(name, tmp_path, monkeypatch):
    monkeypatch.setattr("makd.distill.training.get_available_reporting_integrations", lambda: ["tensorboard"])
    value, expected = TOLD[name]
    assert value != getattr(TrainingConfig(), name)
    found, plain = arguments(tmp_path, **{name: value}), arguments(tmp_path)
    assert {argument: getattr(found, argument) for argument in expected} == expected
    assert all(getattr(plain, argument) != other for argument, other in expected.items())


def test_warmup_is_a_share_of_the_steps(tmp_path):
    assert arguments(tmp_path, warmup=0.25).get_warmup_steps(80) == 20


def test_the_seed_is_that_of_the_data_too(tmp_path):
    found = arguments(tmp_path)
    assert (found.seed, found.data_seed) == (3, 3)
