"""What a report says is worth trying: commands that follow from a run's numbers."""

import pytest

from makd.report.advice import advise, falling
from makd.report.record import read_run
from tests.report.made_up import METRICS, RECIPE, make_run


class TestAdvice:
    def test_a_student_that_was_not_trained_is_to_be(self, tmp_path):
        metrics = {**METRICS, "tokens": {**METRICS["tokens"], "training": 0}}
        gone = {"format": 1, "missing": "not trained"}
        first = advise(read_run(make_run(tmp_path / "student", metrics=metrics, others={"training": gone})))[0]
        assert first.command == f"makd distill {tmp_path / 'student'} --teacher org/teacher --output ANOTHER"

    def test_commands_read_the_pair_as_the_run_did(self, tmp_path):
        recipe = {**RECIPE, "tokenizer": "my words", "recipe": {**RECIPE["recipe"], "head": "base"}}
        found = advise(read_run(make_run(tmp_path / "student", recipe=recipe)))
        (bench,) = [one.command for one in found if one.command.startswith("makd bench")]
        assert "--teacher org/teacher --tokenizer 'my words' --head base" in bench
        metrics = {**METRICS, "tokens": {**METRICS["tokens"], "training": 0}}
        gone = {"training": {"format": 1, "missing": "not trained"}}
        first = advise(read_run(make_run(tmp_path / "start", metrics=metrics, recipe=recipe, others=gone)))[0]
        assert "--teacher org/teacher --tokenizer 'my words' --recipe.head base" in first.command

    def test_what_is_there_without_a_training_is_said_as_it_is(self, tmp_path):
        untrained = {**METRICS, "tokens": {**METRICS["tokens"], "training": 0}}
        gone = {"training": {"format": 1, "missing": "not trained"}}
        for name, more, told in (
            ("start", {"metrics": untrained}, "the closed-form start alone"),
            ("layers", {"metrics": {**untrained, "layerwise": [{"tokens": 5}]}}, "its layers learned one by one"),
            ("given", {"metrics": untrained, "recipe": {**RECIPE, "student": "x"}}, "it is as it came"),
        ):
            first = advise(read_run(make_run(tmp_path / name, others=gone, **more)))[0]
            assert told in first.why

    def test_a_training_that_made_it_worse_wants_a_smaller_learning_rate(self, tmp_path):
        fidelity = {"before": METRICS["fidelity"]["after"], "after": {"prediction_kl": 0.3, "top1_agreement": 0.7}}
        worse = {"teacher": 31.0, "before": 33.0, "after": 36.0}
        metrics = {**METRICS, "perplexity": worse, "fidelity": fidelity}
        first = advise(read_run(make_run(tmp_path / "student", metrics=metrics)))[0]
        assert first.command.endswith("--recipe.training.learning_rate 3.3e-05")

    def test_one_that_is_hardly_faster_is_to_be_timed_in_other_formats(self, tmp_path):
        latency = {side: {"batch1": 100.0, "batch16": 1000.0} for side in ("teacher", "student")}
        found = advise(read_run(make_run(tmp_path / "student", metrics={**METRICS, "latency_ms": latency})))
        assert any("hardly faster" in one.why and one.command.startswith("makd bench ") for one in found)

    def test_little_text_for_wide_linears_wants_more(self, tmp_path):
        metrics = {**METRICS, "tokens": {**METRICS["tokens"], "calibration": 10_000}}  # 1536 inputs, 10 tokens each
        found = advise(read_run(make_run(tmp_path / "few", metrics=metrics)))
        assert any(one.command.endswith("--recipe.calibration.rows 1600") for one in found)
        found = advise(read_run(make_run(tmp_path / "many")))
        assert not any("calibration" in one.command for one in found)

    def test_text_that_no_solver_read_is_not_spoken_of(self, tmp_path):
        few = {**METRICS, "tokens": {**METRICS["tokens"], "calibration": 10_000}}
        without = {**METRICS, "tokens": {"training": 100_000, "evaluation": 25_000}}
        further = make_run(tmp_path / "old", metrics=few, recipe={**RECIPE, "student": "runs/start"})  # a makd noted it
        for run in (further, make_run(tmp_path / "new", metrics=without)):
            assert not any("fitted" in one.why for one in advise(read_run(run)))

    def test_names_with_spaces_are_quoted(self, tmp_path):
        found = advise(read_run(make_run(tmp_path / "my student")))
        assert f"'{tmp_path / 'my student' / 'recipe.yaml'}'" in found[0].command

    def test_falling_compares_the_last_two_quarters(self):
        losses = [4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0, 1.0]
        assert falling([{"loss": one} for one in losses]) == pytest.approx(0.5)
        assert falling([{"loss": 1.0}] * 7) is None
