"""Budgets of the whole model, from those that linears meet alone to those that nothing meets."""

import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

import makd
from makd.anatomy import resolve
from makd.cli.main import main
from makd.student.counting import count_parameters
from tests.models import batch, tiny

WIDE = {"vocab_size": 600, "num_hidden_layers": 4}


def parameters(model):
    return count_parameters(model)["total"]


def make_student(keep, head="base", **options):
    teacher = tiny("bert", head, **WIDE)
    options = {"calibration": [batch(teacher), batch(teacher, seed=5)], **options}
    return makd.factorize(teacher, makd.Budget(keep=keep), rank_multiple=1, **options)


@settings(max_examples=12)
@example(keep=0.98828125, factored=True, solver="whitened")
@given(keep=st.floats(0.2, 1.0), factored=st.booleans(), solver=st.sampled_from(["svd", "whitened"]))
def test_the_budget_is_met_exactly_with_the_vocabulary_too(keep, factored, solver):
    teacher = tiny("bert", **WIDE)
    vocabulary = "factored" if factored else "auto"
    student = make_student(keep, vocabulary=vocabulary, solver=solver, depth="all")
    limit = int(keep * parameters(teacher))
    # the smallest linears' step is 32 + 32; where those are found to be better dense, the next one's is 64 + 32
    assert limit - 96 < parameters(student) <= limit


def test_a_budget_that_linears_meet_leaves_the_rest_alone():
    report = make_student(0.85).factorization
    assert not report.vocabulary
    assert not report.dropped
    assert not report.trials


def test_a_budget_of_the_linears_never_touches_the_rest_by_itself():
    teacher = tiny("bert", **WIDE)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.15), calibration=[batch(teacher)])
    assert not student.factorization.vocabulary
    assert not student.factorization.dropped


def test_a_small_budget_factors_the_vocabulary_and_takes_the_nearest_of_several_depths():
    student = make_student(0.2)
    report = student.factorization
    bands = {f"embeddings.word_embeddings[{tokens}]" for tokens in ("0:9", "9:37", "37:150", "150:600")}
    assert report.vocabulary.keys() <= bands
    assert bands <= report.vocabulary.keys() | report.dense.keys()
    assert parameters(student) <= 0.2 * parameters(tiny("bert", **WIDE))
    kept = 4 - len(report.dropped)
    assert report.trials[kept] == min(report.trials.values())


def test_seconds_are_those_of_all_students_that_were_tried():
    teacher, started = tiny("bert", **WIDE), time.perf_counter()
    texts = [batch(teacher), batch(teacher, seed=5)]
    report = makd.factorize(teacher, makd.Budget(keep=0.2), rank_multiple=1, calibration=texts).factorization
    elapsed = time.perf_counter() - started
    assert len(report.trials) > 1
    assert 0.8 * elapsed < sum(report.seconds.values()) <= elapsed


def test_settings_are_obeyed():
    assert len(make_student(0.3, depth=2).factorization.dropped) == 2
    assert not make_student(0.2, depth="all").factorization.dropped
    assert not make_student(0.6, vocabulary="dense").factorization.vocabulary
    assert make_student(0.9, vocabulary="factored", solver="svd").factorization.dense is not None


def test_without_text_all_layers_stay():
    assert not make_student(0.2, calibration=None, solver="svd").factorization.dropped


def test_a_budget_that_nothing_meets_is_refused_with_the_lowest_that_something_does():
    with pytest.raises(makd.MakdError, match=r"rank 1 everywhere, the vocabulary too, 3 layers dropped") as caught:
        make_student(0.01)
    lowest = int(str(caught.value).split("Give one from ")[1].split(" to ")[0].replace(",", ""))
    teacher = tiny("bert", **WIDE)
    student = makd.factorize(teacher, makd.Budget(params=lowest), calibration=[batch(teacher)])
    assert parameters(student) == lowest
    with pytest.raises(makd.MakdError, match="below the smallest"):
        makd.factorize(teacher, makd.Budget(params=lowest - 1), calibration=[batch(teacher)])


def test_what_would_go_lower_is_said():
    with pytest.raises(makd.MakdError, match="vocabulary auto and depth auto may go lower"):
        make_student(0.2, vocabulary="dense", depth="all")


@pytest.mark.parametrize(("setting", "value"), [("vocabulary", "some"), ("depth", "few")])
def test_wrong_words_are_refused_with_those_that_are_allowed(setting, value):
    with pytest.raises(makd.MakdError, match=rf"factorize.{setting} is auto, .* got '{value}'"):
        makd.FactorizeConfig(**{setting: value})


def test_such_a_student_learns_and_its_tied_factors_stay_tied(tmp_path):
    teacher = tiny("llama", "causal_lm", tie_word_embeddings=True, num_hidden_layers=3)
    inputs = batch(teacher)
    student = makd.factorize(
        teacher, makd.Budget(keep=0.3), ranks="uniform", calibration=[inputs], vocabulary="factored", depth=2
    )
    rows = [{name: value[0] for name, value in inputs.items()} for _ in range(8)]
    arguments = TrainingArguments(
        tmp_path, max_steps=30, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=10, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    trainer = makd.DistillTrainer(student, teacher, plan="full", args=arguments, train_dataset=rows)
    before = student.get_input_embeddings().directions.weight.detach().clone()
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "matrix" in entry]
    for aspect in ("loss", "matrix", "hidden", "attention", "logits"):
        assert losses[-1][aspect] < losses[0][aspect], aspect
    embeddings, head = student.get_input_embeddings(), student.get_output_embeddings()
    assert head.expand.weight is embeddings.table.weight
    assert head.reduce.weight is embeddings.directions.weight
    assert not torch.equal(before, embeddings.directions.weight)
    assert sum(layer.is_skipped for layer in resolve(student).layers) == 1


def test_the_command_line_makes_a_student_of_eight_percent(tmp_path, tokenizer):
    teacher = tiny("bert", vocab_size=4000, num_hidden_layers=6)
    teacher.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    places = ["--teacher", str(tmp_path / "teacher"), "--output", str(tmp_path / "out")]
    small = ["--data.path", "pydoc", "--data.rows", "8", "--data.max_length", "16", "--recipe.evaluation.rows", "8"]
    code = main(["factorize", *places, "--budget.keep", "0.08", "--recipe.evaluation.latency", "false", *small])
    assert code == 0
    from transformers import AutoModel

    student = AutoModel.from_pretrained(tmp_path / "out")
    assert parameters(student) <= 0.08 * parameters(teacher)
