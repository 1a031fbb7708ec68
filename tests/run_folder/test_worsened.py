"""A training that spoils its start is told of, and no other."""

import logging

import pytest

import makd
from makd.measures import worsened

TEXTS = [f"The {kind} number {index} is a sequence of names." for kind in ("list", "class") for index in range(100)]


def fidelity(before, after):
    return {"fidelity": {"before": before, "after": after}}


def test_all_that_was_measured_has_to_be_worse():
    start = {"rank_correlation": 0.90, "cosine": 0.80}
    assert worsened(fidelity(start, {"rank_correlation": 0.89, "cosine": 0.70})) == [
        "rank correlation 0.9000 before, 0.8900 after",
        "cosine to teacher 0.8000 before, 0.7000 after",
    ]
    assert worsened(fidelity(start, {"rank_correlation": 0.89, "cosine": 0.81})) == []


@pytest.mark.parametrize(("after", "is_worse"), [(0.0104, False), (0.0106, True), (0.0050, False)])
def test_a_distance_counts_from_a_twentieth_on(after, is_worse):
    assert bool(worsened(fidelity({"prediction_kl": 0.01}, {"prediction_kl": after}))) is is_worse


@pytest.mark.parametrize(("after", "is_worse"), [(20.0, False), (23.0, True), (12.0, False)])
def test_perplexity_counts_by_its_distance_to_the_teacher_s(after, is_worse):
    metrics = {"perplexity": {"teacher": 10.0, "before": 20.0, "after": after}}
    assert bool(worsened(metrics)) is is_worse


def test_a_task_learned_at_the_teacher_s_cost_is_no_fault():
    task = {"task": {"name": "mrpc", "teacher": {"score": 0.9}, "before": {"score": 0.7}, "after": {"score": 0.8}}}
    worse = fidelity({"prediction_kl": 0.01}, {"prediction_kl": 0.05})
    assert worsened({**task, **worse}) == []
    task["task"]["after"]["score"] = 0.6
    assert worsened({**task, **worse}) == [
        "score 0.7000 before, 0.6000 after",
        "prediction KL (nats) 0.0100 before, 0.0500 after",
    ]


def test_nothing_is_said_where_nothing_was_measured_before():
    assert worsened({"fidelity": {"after": {"cosine": 0.1}}, "perplexity": {"teacher": 2.0, "after": 9.0}}) == []


@pytest.mark.parametrize(("rate", "told"), [(1.0, 1), (1e-5, 0)])
def test_a_run_says_so_and_its_report_keeps_it(rate, told, encoder_folder, tmp_path, caplog):
    recipe = makd.Recipe(
        plan=makd.Plan(preset="fast"),
        training=makd.TrainingConfig(steps=3, batch_size=4, learning_rate=rate),
        calibration=makd.CalibrationConfig(rows=16),
        evaluation=makd.EvaluationConfig(rows=40, latency=False),
        device="cpu",
    )
    with caplog.at_level(logging.WARNING):
        report = makd.compress(str(encoder_folder), TEXTS, makd.Budget(keep_linears=0.5), recipe, tmp_path / "student")
    said = [record.message for record in caplog.records if "worse than its start" in record.message]
    assert len(said) == told
    kept = (report.folder / "report" / "warnings.json").read_text(encoding="utf-8")
    assert kept.count("worse than its start") == told
