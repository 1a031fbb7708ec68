"""Methods side by side: the same cell gives the same number, and a killed run goes on."""

import logging
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import makd
from makd import comparison
from makd.cache import write_cache
from makd.comparison import caches, jobs
from makd.comparison import setup as setups
from makd.comparison.cells import all_cells, cell_hash
from makd.comparison.done import RESULTS_FILE
from makd.comparison.results import read_lines
from makd.comparison.setup import prepare_setup, teacher_folder
from makd.comparison.teach import teach
from makd.errors import DataError, OutputError
from tests.comparison.experiments import TRAINING, make, quiet


class TestRuns:
    def test_a_line_has_all_that_the_page_and_another_person_need(self, done):
        experiment, lines = done
        assert len(lines) == len(all_cells(experiment)) == 8
        for line in lines:
            assert line["metrics"]["score"] == line["score"]
            assert line["params"]["student"]["linears"] <= 0.6 * line["params"]["teacher"]["linears"]
            assert line["steps"] == 2
            assert line["tokens"] > 0
            assert {"prepare", "cache", "train", "evaluate", "total"} == line["seconds"].keys()
            assert line["seconds"]["cache"] == 0.0
            assert line["environment"]["versions"]["makd"]
        assert lines == read_lines(Path(experiment.output) / RESULTS_FILE)

    def test_the_methods_see_the_same_tokens_and_teacher(self, done):
        _, lines = done
        by_setup = {}
        for line in lines:
            key = line["cell"]["task"], line["cell"]["seed"]
            by_setup.setdefault(key, set()).add((line["tokens"], line["teacher"]["score"]))
        assert len(by_setup) == 4
        assert all(len(found) == 1 for found in by_setup.values())

    def test_one_cell_alone_gives_the_same_number_elsewhere(self, done, data, encoder_folder, tmp_path):
        _, lines = done
        alone = make(data, encoder_folder, tmp_path / "alone")
        (line,) = makd.compare(alone, only="task=stsb,method=makd_paper,seed=2")
        same = next(other for other in lines if other["cell"] == line["cell"])
        assert line["fingerprint"] == same["fingerprint"]
        assert line["metrics"] == same["metrics"]

    def test_data_that_cannot_be_read_is_told_before_anything_is_taught(self, data, encoder_folder, tmp_path):
        last = makd.TaskConfig(name="glue/stsb", path="mrpc", text_columns=("sentence1", "nothing"), max_length=32)
        experiment = make(data, encoder_folder, tmp_path / "wrong")
        wrong = replace(experiment, tasks=(experiment.tasks[0], last))
        with pytest.raises(DataError, match="no column 'nothing'"):
            makd.compare(wrong)
        assert not (tmp_path / "wrong").exists()

    def test_a_killed_run_goes_on_with_what_is_missing(self, done, data, encoder_folder, tmp_path, monkeypatch):
        _, lines = done
        experiment, teach, calls = make(data, encoder_folder, tmp_path / "killed", seeds=(1,)), jobs.teach, []

        def stop_at_the_third(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return teach(*arguments)

        monkeypatch.setattr(jobs, "teach", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            makd.compare(experiment)
        results = tmp_path / "killed" / RESULTS_FILE
        assert len(read_lines(results)) == 2
        with results.open("a") as file:
            file.write('{"cell": {"task": "cut o')  # killed while it wrote
        again = makd.compare(experiment)
        assert len(calls) == 5
        assert [line["fingerprint"] for line in again] == [line["fingerprint"] for line in lines[:4]]
        assert len(read_lines(results)) == 4

    def test_nothing_is_run_twice_and_a_teacher_is_made_once(self, done, monkeypatch):
        experiment, lines = done
        monkeypatch.setattr(setups, "prepare_setup", None)
        before = {*(Path(experiment.output) / "teachers").iterdir()}
        assert makd.compare(experiment) == lines
        made = {teacher_folder(experiment, task, seed) for task in experiment.tasks for seed in experiment.seeds}
        assert len(made) == 4
        assert made <= before == {*(Path(experiment.output) / "teachers").iterdir()}

    def test_other_settings_are_other_cells_and_other_teachers(self, done):
        experiment, _ = done
        cell, task = all_cells(experiment)[0], experiment.tasks[0]
        longer = replace(experiment, training=makd.TrainingConfig(steps=3))
        assert cell_hash(longer, cell, {}) != cell_hash(experiment, cell, {})
        assert teacher_folder(longer, task, 1) == teacher_folder(experiment, task, 1)
        other = replace(experiment, finetune=makd.FinetuneRecipe())
        assert teacher_folder(other, task, 1) != teacher_folder(experiment, task, 1)
        assert not comparison.done_lines(longer, all_cells(longer))

    @pytest.mark.parametrize(
        "idle",
        [
            {"training": replace(TRAINING, log_every=7)},
            {"training": replace(TRAINING, report_to="all")},
            {"training": replace(TRAINING, epochs=9.0)},
            {"finetune": makd.FinetuneRecipe(training=replace(TRAINING, log_every=7, save_every=5))},
        ],
        ids=["log_every", "report_to", "epochs beside steps", "finetune"],
    )
    def test_what_changes_no_weight_makes_no_other_cell_or_teacher(self, done, idle):
        experiment, lines = done
        other = replace(experiment, **idle)
        assert list(comparison.done_lines(other, all_cells(other)).values()) == lines
        assert teacher_folder(other, other.tasks[0], 1) == teacher_folder(experiment, experiment.tasks[0], 1)

    def test_how_large_the_files_of_a_cache_are_makes_no_other_cell(self, done):
        one, other = (
            replace(done[0], cache=makd.CacheConfig(shard_megabytes=size))
            for size in (makd.CacheConfig.shard_megabytes, 100)
        )
        cell = all_cells(one)[0]
        assert cell_hash(other, cell, {}) == cell_hash(one, cell, {}) != cell_hash(done[0], cell, {})

    def test_text_without_labels_makes_other_cells_of_the_same_teacher(self, done):
        experiment = done[0]
        more = replace(experiment.tasks[0], extra_text="texts.txt")
        cell = all_cells(experiment)[0]
        assert cell_hash(experiment, replace(cell, task=more), {}) != cell_hash(experiment, cell, {})
        assert teacher_folder(experiment, more, 1) == teacher_folder(experiment, cell.task, 1)

    def test_teacher_and_students_are_measured_in_batches_of_the_fine_tunings_size(self, done, tmp_path):
        experiment, sizes = done[0], []
        few = replace(experiment, output=str(tmp_path), finetune=replace(experiment.finetune, evaluation_batch_size=2))
        setup = prepare_setup(few, few.tasks[0], 1, quiet)
        setup.teacher.register_forward_pre_hook(
            lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
        )
        assert setup.measure(setup.teacher).keys() == setup.teacher_scores.keys()
        assert set(sizes) == {2}

    def test_with_a_cache_the_teacher_is_asked_once_for_all_methods_and_students_learn_the_same(
        self, done, data, encoder_folder, tmp_path, monkeypatch
    ):
        experiment = make(
            data, encoder_folder, tmp_path / "cached", seeds=(1,), cache=makd.CacheConfig(dtype="float32"),
            methods=tuple(makd.MethodConfig(name=name) for name in ("makd_paper", "low_rank_logits", "low_rank_svd")),
        )  # fmt: skip
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(tempfile, "tempdir", None)
        built = []
        monkeypatch.setattr(caches, "write_cache", lambda *args: built.append(args) or write_cache(*args))
        lines = makd.compare(experiment, only="task=stsb")
        assert len(built) == 1
        paper, logits, plain = lines
        assert paper["seconds"]["cache"] == logits["seconds"]["cache"] > plain["seconds"]["cache"] == 0
        live = next(line for line in done[1] if line["cell"] == paper["cell"])
        assert paper["hash"] != live["hash"]
        assert paper["metrics"] == pytest.approx(live["metrics"], abs=1e-3)
        assert not list(tmp_path.glob("makd-cells-*"))

    def test_what_a_cache_keeps_is_removed_when_a_cell_fails(self, data, encoder_folder, tmp_path, monkeypatch):
        experiment = make(data, encoder_folder, tmp_path / "failed", cache=makd.CacheConfig())
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(jobs, "teach", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            makd.compare(experiment, limit=1)
        assert not list(tmp_path.glob("makd-cells-*"))

    def test_how_far_the_factorization_of_a_start_is_is_told_while_it_goes_on(self, setup):
        told, method = [], makd.MethodConfig(name="makd").build()
        teach(setup, method, makd.Budget(keep_linears=0.6), TRAINING, 1, told.append)
        stages = [one.what for one in told]
        last = len(stages) - 1 - stages[::-1].index("prepare")
        assert {"calibrate", "fit layers"} <= {*stages[stages.index("prepare") : last]}

    def test_limit_runs_so_many_cells(self, data, encoder_folder, tmp_path):
        experiment = make(data, encoder_folder, tmp_path / "some")
        assert len(makd.compare(experiment, limit=1)) == 1


def test_a_broken_line_in_the_middle_is_told(tmp_path):
    (tmp_path / "lines.jsonl").write_text("{}\nbroken\n{}\n")
    with pytest.raises(OutputError, match="line 2"):
        read_lines(tmp_path / "lines.jsonl")


def test_a_teacher_that_another_process_is_making_is_waited_for(data, encoder_folder, tmp_path, monkeypatch, caplog):
    experiment, made = make(data, encoder_folder, tmp_path), []
    begun, may_end = threading.Event(), threading.Event()

    def teach(model, task, recipe, folder, **others):
        made.append(folder)
        begun.set()
        assert may_end.wait(20)
        folder.mkdir(parents=True)

    monkeypatch.setattr(setups, "finetune", teach)
    with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.INFO, logger="makd"):
        first = pool.submit(setups.make_teacher, experiment, experiment.tasks[0], 1, quiet)
        assert begun.wait(20)
        second = pool.submit(setups.make_teacher, experiment, experiment.tasks[0], 1, quiet)
        while "waiting for it" not in caplog.text:
            assert not second.done()
            time.sleep(0.01)
        may_end.set()
        assert first.result() == second.result() == made[0]
    assert len(made) == 1
