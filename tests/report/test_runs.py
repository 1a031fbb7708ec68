"""Several runs in one report: which stand beside each other, and when one of them is called the best."""

import re

import pytest

from makd.errors import SettingError
from makd.report import write_report
from tests.report.made_up import METRICS, RECIPE, make_run, measured_as
from tests.report.reading import section


def is_ranked(tmp_path, one, two):
    """Whether a report of two runs names the best, and warns of nothing; else it warns and names none."""
    runs = [make_run(tmp_path / "one", **one), make_run(tmp_path / "two", **two)]
    told = section(write_report(runs, tmp_path / "both.html").read_text(encoding="utf-8"), "frontier")
    assert ("Best quality" in told) != ("not to be compared as" in told)
    return "Best quality" in told


class TestSeveralRuns:
    def test_they_stand_beside_each_other_and_their_own_sections_are_folded(self, tmp_path):
        smaller = {**METRICS, "params": {**METRICS["params"], "total": {"teacher": 134_515_008, "student": 67_257_504}}}
        runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", metrics=smaller)]
        text = write_report(runs, tmp_path / "both.html").read_text(encoding="utf-8")
        told = section(text, "frontier")
        assert "Quality against size" in told
        assert "Quality against latency" in told
        assert "67,257,504 (50.0%)" in told
        assert len(re.findall(r'<details class="run"', text)) == 2

    def test_runs_of_the_same_name_are_told_apart_by_what_is_above_them(self, tmp_path):
        runs = [make_run(tmp_path / name / "student") for name in ("a", "b")]
        text = write_report(runs, tmp_path / "both.html").read_text(encoding="utf-8")
        assert "<summary>a/student</summary>" in text

    def test_different_teachers_are_said(self, tmp_path):
        runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", recipe={**RECIPE, "teacher": "another"})]
        assert "These runs have 2 teachers" in write_report(runs, tmp_path / "both.html").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("others", "is_alike"),
        [
            ({}, True),
            ({"metrics": {**METRICS, "measured_on": {"held_out": "abc"}}}, True),
            ({"metrics": {**METRICS, "measured_on": {"held_out": "def"}}}, False),
            ({"metrics": METRICS}, False),  # of an older makd, which kept no digest
        ],
        ids=["the same run", "the same rows", "other rows", "unknown rows"],
    )
    def test_runs_that_were_measured_on_other_rows_are_not_ranked(self, tmp_path, others, is_alike):
        one = {"metrics": {**METRICS, "measured_on": {"held_out": "abc"}}}
        assert is_ranked(tmp_path, one, {**one, **others}) == is_alike

    @pytest.mark.parametrize(
        ("others", "is_alike"),
        [
            ({}, True),
            ({"recipe": {**RECIPE, "data": {"path": "other.txt"}}}, False),
            ({"recipe": {**RECIPE, "recipe": {"evaluation": {"rows": 8}}}}, False),
            ({"metrics": {**METRICS, "perplexity": {"teacher": 61.5, "before": 70.0, "after": 66.0}}}, False),
        ],
        ids=["the same", "another text", "other rows of it", "another score of the teacher"],
    )
    def test_runs_of_an_older_makd_are_ranked_where_nothing_speaks_against_it(self, tmp_path, others, is_alike):
        assert is_ranked(tmp_path, {}, others) == is_alike

    def test_a_task_s_score_hangs_on_the_task_s_rows_alone(self, tmp_path):
        scored = measured_as(accuracy=(0.8, 0.7, 0.75))
        runs = [{"metrics": {**scored, "measured_on": {"held_out": text, "task": "abc"}}} for text in ("one", "two")]
        assert is_ranked(tmp_path, *runs)

    def test_students_of_different_teachers_are_not_ranked(self, tmp_path):
        assert not is_ranked(tmp_path, {}, {"recipe": {**RECIPE, "teacher": "another"}})

    def test_they_need_a_place(self, tmp_path):
        with pytest.raises(SettingError, match="--output"):
            write_report([make_run(tmp_path / "one"), make_run(tmp_path / "two")])
