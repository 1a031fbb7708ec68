"""Evaluations during a training: losses of all rows, and what metrics are given."""

import pytest
import torch
from transformers import TrainingArguments

import makd
from makd.distill import SupervisedTrainer
from makd.errors import DataError
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


TEXTS = [[11, 12, 13, 14, 15, 16, 17], [21, 22, 23], [31, 32, 33, 34], [41, 42]]
WIDTH = 7


def padding(side, *, marked=True):
    """A collator of whole texts, as a user may write it."""

    def collate_texts(rows):
        found = {"input_ids": [], "attention_mask": [], "labels": []}
        for text in (row["input_ids"] for row in rows):
            for name, values, filler in (
                ("input_ids", text, 0), ("attention_mask", [1] * len(text), 0), ("labels", text, -100),
            ):  # fmt: skip
                more = [filler] * (WIDTH - len(text))
                found[name].append([*more, *values] if side == "left" else [*values, *more])
        if not marked:
            del found["attention_mask"]
        return {name: torch.tensor(rows) for name, rows in found.items()}

    return collate_texts


def learning(folder, name, head, taught, collator):
    """A trainer of a model with positions of its own, and its texts."""
    given = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": text} for text in TEXTS]
    more = {"args": given, "data_collator": collator, "train_dataset": rows, "eval_dataset": rows}
    model = tiny(name, head=head)
    if taught:
        return makd.DistillTrainer(model, tiny(name, head=head, seed=1), **more)
    return SupervisedTrainer(model, dropout=False, **more)


@pytest.mark.parametrize("taught", [False, True], ids=["labels alone", "with a teacher"])
@pytest.mark.parametrize(("name", "head"), [("bert", "token_classification"), ("gpt2", "causal_lm")])
def test_a_collator_that_pads_on_the_left_teaches_and_measures_as_one_that_pads_on_the_right(
    tmp_path, name, head, taught
):
    def learned(side):
        collator = padding(side)
        if head == "token_classification":
            collator = with_classes(collator)
        trainer = learning(tmp_path, name, head, taught, collator)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return before, makd.fingerprint(trainer.model)

    assert learned("left") == learned("right")


def with_classes(collator):
    """Labels of two classes, as a token classifier has them."""

    def collate_classes(rows):
        found = collator(rows)
        return {**found, "labels": found["labels"].where(found["labels"] < 0, found["labels"] % 2)}

    return collate_classes


@pytest.mark.parametrize("taught", [False, True], ids=["labels alone", "with a teacher"])
def test_a_collator_whose_padding_no_mask_marks_is_refused_before_the_first_step(tmp_path, taught):
    trainer = learning(tmp_path, "gpt2", "causal_lm", taught, padding("right", marked=False))
    with pytest.raises(DataError, match="3 or more of the padding token, 0, which would count as text"):
        trainer.evaluate()
    with pytest.raises(DataError, match="3 or more of the padding token, 0, which would count as text"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_texts_that_are_packed_may_end_in_padding_without_a_mask(tmp_path):
    def packed(rows):
        collated = padding("right", marked=False)(rows)
        return {**collated, "position_ids": torch.arange(WIDTH).expand(len(rows), WIDTH)}

    trainer = learning(tmp_path, "gpt2", "causal_lm", True, packed)
    trainer.train()
    assert trainer.state.global_step == 2
