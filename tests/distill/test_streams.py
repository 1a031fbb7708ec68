"""Training rows that come as a stream, in Python."""

import copy

import pytest
from datasets import Dataset

import makd
from makd.distill import DistillTrainer
from tests.distill.test_trainer import make_arguments
from tests.models import tiny


def rows():
    made = [{"input_ids": [5 + number % 7, 9, 12], "attention_mask": [1, 1, 1]} for number in range(40)]
    return Dataset.from_list([{**row, "labels": [-100, *row["input_ids"][1:]]} for row in made])


def test_a_stream_is_trained_on_as_the_rows_themselves_are(tmp_path):
    teacher = tiny("llama", "causal_lm")
    weights = []
    for data in (rows(), rows().to_iterable_dataset()):
        student = copy.deepcopy(tiny("llama", "causal_lm", seed=1))
        arguments = make_arguments(tmp_path, max_steps=3, train_sampling_strategy="sequential")
        DistillTrainer(student, teacher, args=arguments, train_dataset=data).train()
        weights.append(student.model.layers[0].mlp.up_proj.weight.detach().clone())
    assert weights[0].equal(weights[1])


def test_a_stream_has_no_rows_of_like_length(tmp_path):
    teacher = tiny("llama", "causal_lm")
    with pytest.raises(makd.MakdError, match="IterableDataset is a stream, whose lengths nobody knows"):
        DistillTrainer(
            copy.deepcopy(teacher), teacher, tokens_per_batch=64, args=make_arguments(tmp_path),
            train_dataset=rows().to_iterable_dataset(),
        )  # fmt: skip
