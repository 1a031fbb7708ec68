"""Evaluations during a training: losses of all rows, and what metrics are given."""

import pytest
import torch
from transformers import TrainingArguments

import makd
from makd.distill import SupervisedTrainer
from tests.distill.processes import collate, make_rows
from tests.models import tiny

ROWS = make_rows("sequence_classification", "").select(range(13))


def arguments(folder, size):
    return TrainingArguments(
        str(folder), per_device_eval_batch_size=size, report_to="none", use_cpu=True, disable_tqdm=True
    )


def fine_tuning(folder, size, model, **more):
    return SupervisedTrainer(model, args=arguments(folder, size), data_collator=collate, **more)


@pytest.mark.parametrize("size", [1, 2, 4, 13])
def test_the_loss_of_a_fine_tuning_is_a_mean_over_all_labels_whatever_the_batches(tmp_path, size):
    model = tiny("bert", head="sequence_classification")
    with torch.no_grad():
        rows = collate(list(ROWS))
        labels = rows.pop("labels")
        expected = torch.nn.functional.cross_entropy(model(**rows).logits, labels)
    found = fine_tuning(tmp_path, size, model).evaluate(ROWS)["eval_loss"]
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_rows_without_any_label_are_predicted_without_a_loss(tmp_path):
    model = tiny("bert", head="sequence_classification")
    found = fine_tuning(tmp_path, 4, model).predict(ROWS.remove_columns("labels"))
    assert found.predictions.shape == (13, 2)
    assert "test_loss" not in found.metrics


@pytest.mark.parametrize("taught", [False, True])
def test_metrics_are_given_the_logits_and_labels_of_starts_and_of_ends(tmp_path, taught):
    model, teacher = tiny("bert", head="question_answering"), tiny("bert", head="question_answering", seed=1)
    rows = ROWS.remove_columns("labels").map(lambda row, place: {"start_positions": place % 3, "end_positions": 4},
                                             with_indices=True)  # fmt: skip
    more = {"args": arguments(tmp_path, 4), "data_collator": collate}
    trainer = makd.DistillTrainer(model, teacher, **more) if taught else SupervisedTrainer(model, **more)
    found = trainer.predict(rows)
    assert [len(logits) for logits in found.predictions] == [13, 13]
    assert found.label_ids[0].tolist() == rows["start_positions"]
    assert found.label_ids[1].tolist() == rows["end_positions"]
