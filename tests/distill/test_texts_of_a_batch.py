"""`similarity` compares the texts of a batch: batches of one text are refused, where it would be 0 in silence."""

import copy

import pytest
import torch
from transformers import TrainingArguments

import makd
from makd.errors import SettingError
from tests.models import tiny

PLAN = makd.Plan(terms=(makd.Term(aspect="similarity"),))
ROWS = [{"input_ids": torch.arange(2, 2 + length)} for length in (5, 6, 6)]


def trainer(batch_size=8, **kwargs):
    model = tiny("bert")
    arguments = TrainingArguments(
        output_dir="unused", report_to="none", use_cpu=True, per_device_train_batch_size=batch_size
    )
    return makd.DistillTrainer(copy.deepcopy(model), model, plan=PLAN, args=arguments, train_dataset=ROWS, **kwargs)


def test_rows_one_by_one_are_refused():
    with pytest.raises(SettingError, match=r"every batch has one text.*Give a larger per_device_train_batch_size"):
        trainer(batch_size=1)


def test_so_few_tokens_that_no_two_rows_are_together_are_refused():
    with pytest.raises(SettingError, match=r"every batch has one text.*Give a larger tokens_per_batch"):
        trainer(tokens_per_batch=6)


def test_two_texts_of_a_batch_are_enough():
    assert trainer(batch_size=2).plan.terms
    assert trainer(tokens_per_batch=12).plan.terms


def test_a_run_says_so_before_it_makes_a_student(encoder_folder, tmp_path):
    recipe = makd.Recipe(plan=PLAN, training=makd.TrainingConfig(steps=1, batch_size=1), device="cpu")
    told = []
    with pytest.raises(SettingError, match="every batch has one text"):
        makd.compress(
            str(encoder_folder), makd.DataConfig(path="pydoc", rows=8, max_length=16), makd.Budget(keep_linears=0.5),
            recipe, tmp_path / "out", on_progress=told.append,
        )  # fmt: skip
    assert {progress.what for progress in told} == {"load"}
