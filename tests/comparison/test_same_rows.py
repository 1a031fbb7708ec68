"""Cells of other rows than the first ones are not put beside them: neither settings nor files tell which those are."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

import makd
from makd.cache.identity import hash_weights
from makd.comparison.all_results import read_results
from makd.comparison.results import append_line, read_lines
from makd.comparison.same_rows import LEARNED, MEASURED, TAUGHT
from makd.comparison.setup import teacher_folder
from makd.distill.resuming.identity import hash_all_columns
from makd.errors import OutputError
from makd.loading import load_model
from tests.comparison.experiments import make
from tests.tasks.test_tasks import PAIRS, write

FIRST, SECOND = "method=low_rank_svd", "method=makd_paper"


@pytest.fixture(scope="module")
def first(encoder_folder, tmp_path_factory):
    """One of two methods, of the first of two seeds."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "data").mkdir()
    write(folder / "data" / "mrpc", train=PAIRS, validation=PAIRS[:6])
    task = makd.TaskConfig(name="glue/mrpc", path="mrpc", max_length=32)
    experiment = make(folder / "data", encoder_folder, folder / "runs", tasks=(task,))
    makd.compare(experiment, only=f"{FIRST},seed=1")
    return experiment


@pytest.fixture
def begun(first, tmp_path):
    """The same in a folder of one's own."""
    return replace(first, output=str(shutil.copytree(first.output, tmp_path / "runs")))


def change(experiment, part):
    """The line of the first cell, as if it were of other rows."""
    file = Path(experiment.output) / "results.jsonl"
    (line,) = read_lines(file)
    file.write_text("")
    append_line(file, {**line, "rows": {**line["rows"], part: "0" * 16}})


@pytest.mark.parametrize("part", [LEARNED, MEASURED])
def test_a_cell_of_other_rows_is_not_put_beside_one_that_is_done(begun, part):
    change(begun, part)
    with pytest.raises(
        OutputError, match=r"mrpc  low_rank_svd  1 .* other rows than there are now.*Name another output"
    ):
        makd.compare(begun, only=f"{SECOND},seed=1")
    assert len(read_lines(Path(begun.output) / "results.jsonl")) == 1


def test_another_seed_learns_in_another_order_and_is_measured_on_the_same(begun):
    (other,) = makd.compare(begun, only=f"{FIRST},seed=2")
    (first,) = makd.compare(begun, only=f"{FIRST},seed=1")
    assert other["rows"][MEASURED] == first["rows"][MEASURED]
    assert other["rows"][LEARNED] != first["rows"][LEARNED]
    elsewhere = replace(begun, output=str(Path(begun.output).with_name("elsewhere")))
    assert makd.compare(elsewhere, only=f"{FIRST},seed=1")[0]["rows"] == first["rows"]


def test_another_seed_may_have_learned_from_anything(begun):
    change(begun, LEARNED)
    assert len(makd.compare(begun, only=f"{FIRST},seed=2")) == 1


def test_lines_of_other_settings_say_nothing(begun):
    change(begun, MEASURED)
    shorter = replace(begun, tasks=(replace(begun.tasks[0], max_length=16),))
    assert len(makd.compare(shorter, only=f"{FIRST},seed=1")) == 1


def test_lines_from_before_there_were_digests_are_told(begun, caplog):
    file = Path(begun.output) / "results.jsonl"
    (line,) = read_lines(file)
    del line["rows"]
    file.write_text("")
    append_line(file, line)
    with caplog.at_level(logging.WARNING):
        makd.compare(begun, only="seed=1")
    assert "results.jsonl: 1 cells (mrpc) do not say which rows" in caplog.text
    caplog.clear()
    makd.compare(begun, only="seed=1")
    assert not caplog.text, "nothing is left to run"


def test_no_table_is_made_of_lines_that_were_measured_on_different_rows(begun, tmp_path):
    makd.compare(begun, only="seed=1")
    file = Path(begun.output) / "results.jsonl"
    one, other = read_lines(file)
    assert len(read_results(begun, "experiment.yaml").lines) == 2
    file.write_text("")
    for line in (one, {**other, "rows": {**other["rows"], MEASURED: "0" * 16}}):
        append_line(file, line)
    with pytest.raises(OutputError, match=r"cell mrpc  .* and cell mrpc  .* were measured on different rows"):
        read_results(begun, "experiment.yaml")


def test_a_cell_of_another_teacher_is_not_put_beside_one_that_is_done(begun):
    """As where the folder of teachers was lost, and one is fine-tuned anew on another machine."""
    change(begun, TAUGHT)
    with pytest.raises(OutputError, match=r"mrpc  low_rank_svd  1 .* had another teacher than there is now"):
        makd.compare(begun, only=f"{SECOND},seed=1")
    assert len(makd.compare(begun, only=f"{SECOND},seed=2")) == 1


def test_no_table_is_made_of_cells_of_one_seed_with_two_teachers(begun):
    makd.compare(begun, only="seed=1")
    file = Path(begun.output) / "results.jsonl"
    one, other = read_lines(file)
    file.write_text("")
    for line in (one, {**other, "rows": {**other["rows"], TAUGHT: "0" * 16}}):
        append_line(file, line)
    with pytest.raises(OutputError, match=r"had different teachers.*rows\.taught_by of their lines differ"):
        read_results(begun, "experiment.yaml")


def test_a_teacher_is_the_same_on_every_machine(first):
    """Weights decide, and not what a machine computes with them."""
    (line,) = makd.compare(first, only=f"{FIRST},seed=1")
    folder = teacher_folder(first, first.tasks[0], 1)
    teacher = load_model(str(folder), first.tasks[0].kind.head)
    assert line["rows"][TAUGHT] == hash_weights(teacher)[:16]


def test_a_search_does_not_go_on_with_trials_of_other_rows(first, tmp_path):
    searched = replace(
        first, output=str(tmp_path / "searched"), search=makd.SearchConfig(trials=1, steps=1), methods=first.methods[:1]
    )
    makd.compare(searched, only=f"{FIRST},seed=1")
    file = tmp_path / "searched" / "search.jsonl"
    (trial,) = read_lines(file)
    file.write_text("")
    append_line(file, {**trial, "rows": {**trial["rows"], MEASURED: "0" * 16}})
    more = replace(searched, search=replace(searched.search, trials=2))
    with pytest.raises(OutputError, match=r"Trial 0 of mrpc .* was measured on other rows than there are now"):
        makd.compare(more, only=f"{FIRST},seed=1")


ROWS = {"input_ids": [[1, 2], [3], []], "label": [0, 1, 1], "text": ["a", "b", "é"], "own": [[[1]], [[2], []], []]}


class TestDigests:
    def test_rows_are_what_they_say_however_they_are_kept(self):
        whole = datasets.Dataset.from_dict(ROWS)
        narrow = whole.cast_column("label", datasets.Value("int8"))
        other_order = whole.select_columns(["text", "own", "label", "input_ids"])
        parts = datasets.concatenate_datasets([whole.select([0]), whole.select([1, 2])])
        picked = whole.select([2, 1, 0]).select([2, 1, 0])
        longer = datasets.concatenate_datasets([whole, whole]).select(range(3, 6))
        for rows in (narrow, other_order, parts.flatten_indices(), picked, longer):
            assert hash_all_columns(rows) == hash_all_columns(whole)

    @pytest.mark.parametrize(
        "other",
        [
            {"input_ids": [[1], [2, 3], []]},
            {"input_ids": [[1, 2], [3], None]},
            {"label": [0, 1, 0]},
            {"label": [0.0, 1.0, 1.5]},
            {"text": ["a", "b", "e"]},
            {"own": [[[1]], [[2]], []]},
        ],
        ids=str,
    )
    def test_another_value_anywhere_is_another_digest(self, other):
        whole, changed = datasets.Dataset.from_dict(ROWS), datasets.Dataset.from_dict({**ROWS, **other})
        assert hash_all_columns(changed) != hash_all_columns(whole)
