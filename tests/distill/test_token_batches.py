"""Training on batches of tokens: which rows it sees, and that a run can be cut and resumed."""

import logging

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import makd
from makd.distill import DistillTrainer, SupervisedTrainer
from tests.distill.test_trainer import make_arguments, make_pair, same_weights
from tests.models import batch, tiny

LENGTHS = [2, 3, 3, 4, 5, 5, 6, 8, 9, 9, 12, 12, 12, 14, 16, 16]


def make_rows():
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 60, (length,), generator=generator).tolist() for length in LENGTHS]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [0] * (width - len(row[name])) for row in rows])
        for name in ("input_ids", "attention_mask")
    }


class Note(TrainerCallback):
    """Shapes of the batches, and where to stop."""

    def __init__(self, stop=None):
        self.stop, self.seen = stop, []

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.stop


def make_trainer(folder, stop=None, **settings):
    teacher, student = make_pair()
    shapes = []

    def noting(rows):
        found = collate(rows)
        shapes.append(tuple(found["input_ids"].shape))
        return found

    trainer = DistillTrainer(
        student,
        teacher,
        tokens_per_batch=32,
        args=make_arguments(folder, **{"max_steps": -1, "num_train_epochs": 2, **settings}),
        train_dataset=make_rows(),
        data_collator=noting,
        callbacks=[Note(stop)],
    )
    return trainer, shapes


def test_an_epoch_reads_every_row_once_within_the_budget(tmp_path, caplog):
    trainer, shapes = make_trainer(tmp_path, num_train_epochs=1)
    with caplog.at_level(logging.INFO, "makd"):
        trainer.train()
    assert sum(rows for rows, _ in shapes) == len(LENGTHS)
    assert all(rows * width <= 32 for rows, width in shapes)
    assert trainer.state.global_step == len(shapes)
    assert "% of the tokens padding" in caplog.text


def test_an_evaluation_takes_such_batches_too_and_its_loss_is_that_of_all_rows(tmp_path):
    trainer, shapes = make_trainer(tmp_path, num_train_epochs=1)
    trainer.train()
    losses = []
    for tokens in (32, 10**6):
        trainer.tokens_per_batch = tokens
        shapes.clear()
        losses.append(trainer.evaluate(make_rows())["eval_loss"])
        assert sum(rows for rows, _ in shapes) == len(LENGTHS)
        assert all(rows * width <= tokens for rows, width in shapes)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_predictions_are_in_the_order_of_the_rows(tmp_path):
    model, rows = tiny("bert", "sequence_classification"), make_rows()
    trainer = SupervisedTrainer(model, tokens_per_batch=32, args=make_arguments(tmp_path), data_collator=collate)
    found = trainer.predict(rows).predictions
    with torch.no_grad():
        for row, logits in zip(rows, found, strict=True):
            torch.testing.assert_close(torch.tensor(logits), model(**collate([row])).logits[0])


def test_a_fine_tuning_takes_such_batches_too(tmp_path):
    model, shapes = tiny("llama", "causal_lm"), []

    def noting(rows):
        found = collate(rows)
        shapes.append(tuple(found["input_ids"].shape))
        return found | {"labels": found["input_ids"]}

    settings = make_arguments(tmp_path, max_steps=-1, num_train_epochs=1)
    SupervisedTrainer(
        model, tokens_per_batch=32, args=settings, train_dataset=make_rows(), data_collator=noting
    ).train()
    assert sum(rows for rows, _ in shapes) == len(LENGTHS)
    assert all(rows * width <= 32 for rows, width in shapes)


def test_a_run_that_is_cut_within_an_epoch_resumes_to_the_same_student(tmp_path):
    whole, shapes = make_trainer(tmp_path / "whole")
    whole.train()
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    for stop in (3, len(shapes) // 2 + 2):
        folder = tmp_path / str(stop)
        make_trainer(folder, stop, **settings)[0].train()
        trainer, _ = make_trainer(folder, **settings)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == whole.state.global_step
        assert same_weights(whole.model, trainer.model)


def test_the_same_seed_gives_the_same_student_and_another_one_another(tmp_path):
    models = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer, _ = make_trainer(tmp_path / name, seed=seed)
        trainer.train()
        models.append(trainer.model)
    assert same_weights(models[0], models[1])
    assert not same_weights(models[0], models[2])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"batch_size": 4}, 40), ({"batch_size": 1}, 15), ({"tokens_per_batch": 60}, 60), ({"tokens_per_batch": 2}, 15)],
)
def test_a_budget_is_by_default_that_of_average_rows_and_holds_the_longest(settings, expected):
    assert makd.TrainingConfig(**settings).find_tokens([5, 10, 15]) == expected


def test_blocks_of_one_length_come_batch_size_at_a_time():
    assert makd.TrainingConfig(batch_size=8).find_tokens([128] * 50) // 128 == 8


def test_a_budget_below_1_is_refused():
    with pytest.raises(makd.MakdError, match="tokens_per_batch"):
        makd.TrainingConfig(tokens_per_batch=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None])
def test_the_teachers_products_are_made_in_the_dtype_asked_for(dtype, tmp_path):
    teacher, student = make_pair()
    trainer = DistillTrainer(
        student,
        teacher,
        teacher_dtype=dtype,
        args=make_arguments(tmp_path, bf16=dtype is torch.float32),
        train_dataset=make_rows(),
    )
    seen = set()
    teacher.encoder.layer[0].output.dense.register_forward_hook(lambda _module, _inputs, out: seen.add(out.dtype))
    loss = trainer.compute_loss(student.train(), dict(batch(student)))
    loss.backward()
    assert seen == {dtype or torch.float32}
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
