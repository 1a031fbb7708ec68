"""Methods side by side: the same cell gives the same number, a killed run goes on, and the page says what was found."""

import json
import logging
import math
import re
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import optuna
import pytest
import yaml
from scipy.stats import t, ttest_1samp

import makd
from makd import comparison
from makd.baselines import Choice, Span
from makd.cache import write_cache
from makd.cli.compare import load_experiment
from makd.cli.main import main
from makd.comparison import caches, jobs
from makd.comparison import page as pages
from makd.comparison import search as searching
from makd.comparison import setup as setups
from makd.comparison.cells import all_cells, cell_hash, select
from makd.comparison.done import RESULTS_FILE
from makd.comparison.forecast import forecast_seconds
from makd.comparison.plot import draw
from makd.comparison.results import append_line, read_lines
from makd.comparison.schedule import Kind, Schedule
from makd.comparison.search import known_settings, propose, run_trials, search_space, searched_at, spread_settings
from makd.comparison.settings import short_name
from makd.comparison.setup import majority_score, place_data, prepare_setup, teacher_folder
from makd.comparison.statistics import average, difference, mean, pairs
from makd.comparison.tables import best_baseline
from makd.errors import DataError, NumericsError, OutputError, SettingError, UnknownNameError
from makd.tasks.rows import read_task
from tests.tasks.test_tasks import PAIRS, write

ROOT = Path(__file__).parents[1]
SIMILAR = [{**row, "label": float(place % 5)} for place, row in enumerate(PAIRS)]
TRAINING = makd.TrainingConfig(steps=2, batch_size=4)


def quiet(_):
    """No bars."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder / "mrpc", train=PAIRS, validation=PAIRS[:6])
    write(folder / "stsb", train=SIMILAR, validation=SIMILAR[:6])
    return folder


def search_all(experiment, cells, setup):
    """Run all trials that the cells need, on one setup; what was found, by the cells' text."""
    for cell in {str(cell): cell for cell in (searched_at(experiment, cell) for cell in cells)}.values():
        run_trials(experiment, cell, setup, quiet)
    return known_settings(experiment, cells)


def make(data, encoder_folder, output, **settings):
    return makd.Experiment(
        **{
            "teacher": str(encoder_folder),
            "tasks": tuple(makd.TaskConfig(name=f"glue/{name}", path=name, max_length=32) for name in ("mrpc", "stsb")),
            "methods": (makd.MethodConfig(name="low_rank_svd"), makd.MethodConfig(name="makd_paper")),
            "budgets": (makd.Budget(keep_linears=0.6),),
            "seeds": (1, 2),
            "training": TRAINING,
            "finetune": makd.FinetuneRecipe(training=TRAINING),
            "calibration": makd.CalibrationConfig(rows=8),
            "data": str(data),
            "latency": False,
            "device": "cpu",
            "output": str(output),
            **settings,
        }
    )


@pytest.fixture(scope="module")
def done(data, encoder_folder, tmp_path_factory):
    """Two tasks, two methods and two seeds, all run."""
    experiment = make(data, encoder_folder, tmp_path_factory.mktemp("runs") / "whole")
    return experiment, makd.compare(experiment)


@pytest.fixture(scope="module")
def setup(done):
    """Of the first task and seed."""
    return prepare_setup(done[0], done[0].tasks[0], 1, quiet)


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
        assert makd.compare(experiment) == lines
        assert len(list((Path(experiment.output) / "teachers").iterdir())) == 4

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

    def test_limit_runs_so_many_cells(self, data, encoder_folder, tmp_path):
        experiment = make(data, encoder_folder, tmp_path / "some")
        assert len(makd.compare(experiment, limit=1)) == 1


class TestSelection:
    def test_only_names_cells(self, done):
        cells = all_cells(done[0])
        assert [cell.names["seed"] for cell in select(cells, "task=mrpc,method=low_rank_svd")] == [1, 2]
        assert len(select(cells, "task=mrpc,task=stsb,seed=1")) == 4
        assert len(select(cells, "budget=keep_linears=0.6")) == 8

    @pytest.mark.parametrize(
        ("only", "told"),
        [
            ("tusk=mrpc", "task, method, seed, budget"),
            ("task=cola", "mrpc, stsb"),
            ("method=makd", "low_rank_svd, makd_paper"),
            ("seed=7", "1, 2"),
            ("mrpc", "key=value"),
        ],
    )
    def test_what_is_not_there_is_told_with_what_is(self, done, only, told):
        with pytest.raises(makd.MakdError, match=told):
            select(all_cells(done[0]), only)


class TestSettings:
    def test_unknown_names_offer_the_known_ones(self):
        with pytest.raises(UnknownNameError, match="low_rank_svd"):
            makd.MethodConfig(name="low_rank_svg")
        with pytest.raises(UnknownNameError, match="learning_rate"):
            makd.MethodConfig(name="makd", settings={"lerning_rate": 1e-3})
        with pytest.raises(SettingError, match="without , and ="):
            makd.MethodConfig(name="a=b", method="makd")

    @pytest.mark.parametrize(
        ("method", "settings", "told"),
        [
            ("makd", {"learning_rate": "fast"}, "learning_rate of makd is a number; got 'fast'"),
            ("makd", {"learning_rate": -1e-4}, "learning_rate of makd is above 0; got -0.0001"),
            ("makd", {"task_weight": True}, "task_weight of makd is a number; got True"),
            ("makd", {"layers": 3}, "layers of makd is a text or null; got 3"),
            ("tinybert", {"depth": 2.5}, "depth of tinybert is a whole number or null; got 2.5"),
            ("tinybert", {"initial": "copied"}, "initial of tinybert is one of cut, random; got 'copied'"),
        ],
    )
    def test_hyper_parameters_are_checked_before_anything_is_taught(self, method, settings, told):
        with pytest.raises(SettingError, match=re.escape(f"methods[].settings.{told}.")):
            makd.MethodConfig(name=method, settings=settings)

    def test_whole_numbers_of_a_file_stay_whole(self, tmp_path):
        file = tmp_path / "experiment.yaml"
        file.write_text(
            "{teacher: a-model, output: a-folder, tasks: [{name: glue/mrpc}], budgets: [{keep_linears: 0.5}], "
            "methods: [{name: tinybert, settings: {depth: 3, temperature: 2}}]}"
        )
        made = load_experiment(file).methods[0].build()
        assert (made.depth, made.temperature) == (3, 2.0)
        assert isinstance(made.depth, int)

    @pytest.mark.parametrize(
        ("name", "path", "told"),
        [
            ("glue/mrpc", "elsewhere/pairs", "mrpc"),
            ("squad", None, "squad"),
            ("classification", "data/reviews.csv", "reviews"),
            ("classification", "org/tickets", "tickets"),
            ("regression", "data/a=1,b=2", "a-1-b-2"),
        ],
    )
    def test_what_a_cell_calls_a_task(self, name, path, told):
        assert short_name(makd.TaskConfig(name=name, path=path)) == told

    def test_a_method_has_several_rows_under_other_names(self):
        row = makd.MethodConfig(name="fast", method="makd", settings={"preset": "fast", "learning_rate": 2e-4})
        assert row.build().preset == "fast"
        assert row.build(learning_rate=1.0, layer_weight=3.0).learning_rate == 2e-4
        assert row.build(layer_weight=3.0).layer_weight == 3.0

    def test_a_method_may_learn_longer_than_the_others(self):
        row = makd.MethodConfig(name="logits", method="low_rank_logits", times_steps=1.25)
        assert row.lengthened(makd.TrainingConfig(steps=100)).steps == 125
        assert row.lengthened(makd.TrainingConfig(epochs=2.0)).epochs == 2.5
        with pytest.raises(SettingError, match="times_steps is at least 0"):
            makd.MethodConfig(name="makd", times_steps=-1.0)

    def test_an_aspect_left_out_and_more_steps_are_other_cells(self, done):
        experiment = done[0]
        cell = replace(all_cells(experiment)[0], method=makd.MethodConfig(name="makd"))
        given = makd.MethodConfig(name="makd", settings={"without": "matrix"})
        longer = makd.MethodConfig(name="makd", times_steps=2.0)
        hashes = {cell_hash(experiment, replace(cell, method=method), {}) for method in (cell.method, given, longer)}
        assert len(hashes) == 3

    def test_the_examples_are_experiments_and_share_their_cells(self, tmp_path):
        table, ablation = (
            load_experiment(ROOT / "examples" / "encoder" / f"{name}.yaml", output=str(tmp_path))
            for name in ("experiment", "ablation")
        )
        for path in (ROOT / "examples" / "encoder").glob("*.yaml"):
            load_experiment(path)
        shutil.copy(ROOT / "benchmarks" / "results" / "encoder_search.jsonl", tmp_path / searching.SEARCH_FILE)
        ours = [cell for cell in all_cells(table) if cell.method.name == "makd"]
        found = known_settings(table, ours)
        assert None not in found.values()  # the trials in the repository are of the experiment as it is
        hashes = {cell_hash(table, cell, found[str(cell)]) for cell in ours}
        shared = hashes & {cell_hash(ablation, cell, {}) for cell in all_cells(ablation)}
        assert len(shared) == len(ablation.tasks) * len(ablation.seeds)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"seeds": ()}, "at least one"),
            ({"seeds": (1, 1)}, "1 is there twice"),
            ({"seeds": (-1,)}, "at least 0"),
            ({"methods": (makd.MethodConfig(name="makd"),) * 2}, "makd is there twice"),
            ({"training": makd.TrainingConfig(steps=0)}, "training.steps"),
            ({"latency_tokens": 0}, "latency_tokens"),
            ({"search": makd.SearchConfig(trials=2, task="rte")}, "mrpc, stsb"),
            ({"search": makd.SearchConfig(trials=2, settings=("temperature",))}, "matrix_weight"),
            ({"methods": (makd.MethodConfig(name="makd", budgets=(makd.Budget(keep=0.1),)),)}, "keep_linears=0.6"),
        ],
    )
    def test_what_makes_no_grid_is_refused(self, changes, told, data, encoder_folder, tmp_path):
        with pytest.raises(makd.MakdError, match=told):
            make(data, encoder_folder, tmp_path, **changes)

    def test_a_method_may_have_some_of_the_budgets(self, data, encoder_folder, tmp_path):
        small, large = makd.Budget(keep_linears=0.3), makd.Budget(keep_linears=0.6)
        methods = (makd.MethodConfig(name="makd"), makd.MethodConfig(name="pkd", budgets=(large,)))
        cells = all_cells(make(data, encoder_folder, tmp_path, budgets=(small, large), methods=methods, seeds=(1,)))
        assert [(cell.method.name, cell.budget) for cell in cells if cell.task.name == "glue/mrpc"] == [
            ("makd", small), ("makd", large), ("pkd", large)
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("idle", "why"),
        [
            ({"learning_rate": 1e-3}, "each method's own"),
            ({"evaluate_every": 1}, "no cell is evaluated"),
            ({"save_every": 1}, "begins anew"),
            ({"shard_teacher": True}, "in one process"),
        ],
    )
    def test_what_no_cell_does_anything_with_is_refused(self, data, encoder_folder, tmp_path, idle, why):
        with pytest.raises(SettingError, match=rf"training.{next(iter(idle))} of an experiment does nothing: .*{why}"):
            make(data, encoder_folder, tmp_path, training=replace(TRAINING, **idle))

    def test_adapters_without_peft_are_refused_before_a_teacher_is_made(
        self, data, encoder_folder, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("makd.distill.trainable.importlib.util.find_spec", lambda _: None)
        experiment = make(data, encoder_folder, tmp_path, methods=(makd.MethodConfig(name="low_rank_lora"),))
        with pytest.raises(SettingError, match="needs peft"):
            makd.compare(experiment)
        assert not (tmp_path / "teachers").exists()

    @pytest.mark.parametrize("wrong", [{"trials": -1}, {"held_out": 1.0}, {"steps": 0}])
    def test_what_makes_no_search_is_refused(self, wrong):
        with pytest.raises(SettingError, match="search"):
            makd.SearchConfig(**wrong)

    def test_relative_paths_are_looked_for_in_the_data_folder(self, data, monkeypatch):
        task = makd.TaskConfig(name="glue/mrpc", path="mrpc")
        assert place_data(task, str(data)).path == str(data / "mrpc")
        monkeypatch.setenv("MAKD_DATA", str(data))
        assert place_data(task, None).path == str(data / "mrpc")
        hub = replace(task, path="nyu-mll/glue")
        assert place_data(hub, str(data)) == hub
        with pytest.raises(DataError, match="is no folder"):
            place_data(task, str(data / "nowhere"))

    def test_teacher_and_students_are_measured_in_batches_of_the_fine_tunings_size(self, done):
        experiment, sizes = done[0], []
        few = replace(experiment, finetune=replace(experiment.finetune, evaluation_batch_size=2))
        setup = prepare_setup(few, few.tasks[0], 1, quiet)
        setup.teacher.register_forward_pre_hook(
            lambda _, __, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
        )
        assert setup.measure(setup.teacher).keys() == setup.teacher_scores.keys()
        assert set(sizes) == {2}


class TestSearch:
    """Where scores are not of a student, they are of the learning rate alone and best at 5e-5."""

    @pytest.fixture
    def taught(self, monkeypatch):
        """The methods that a search teaches, with the rows; they are scored at once."""
        taught = []

        def score(setup, method, budget, training, seed, progress):
            taught.append((method, setup))
            distance = math.log10(method.learning_rate / 5e-5)
            return SimpleNamespace(scores={"score": 1 - distance**2}, seconds={"train": 0.0})

        monkeypatch.setattr(searching, "teach", score)
        return taught

    @pytest.fixture
    def search(self, done, setup, taught, tmp_path):
        """Search a method's settings; what was found, and the lines of its trials without what time they took."""

        def search(trials, folder="searched", names=None, **method):
            row = makd.MethodConfig(**{"name": "makd_paper", **method})
            searched = makd.SearchConfig(trials=trials, held_out=0.25, settings=names)
            settings = {"output": str(tmp_path / folder), "search": searched}
            experiment = replace(done[0], methods=(row,), seeds=(1,), **settings)
            cell = all_cells(experiment)[0]
            found = search_all(experiment, [cell], setup)[str(cell)]
            lines = read_lines(tmp_path / folder / searching.SEARCH_FILE)
            return found, [{name: value for name, value in line.items() if name != "seconds"} for line in lines]

        return search

    def test_the_best_settings_are_those_of_the_cell(self, data, encoder_folder, tmp_path):
        trials = makd.SearchConfig(trials=2, steps=1)
        experiment = make(data, encoder_folder, tmp_path / "searched", search=trials, seeds=(1,))
        (line,) = makd.compare(experiment, only="task=mrpc,method=makd_paper")
        lines = read_lines(tmp_path / "searched" / "search.jsonl")
        assert [trial["trial"] for trial in lines] == [0, 1]
        best = max(lines, key=lambda trial: trial["score"])
        assert best["settings"].items() <= line["settings"].items()

    def test_the_first_trial_is_of_the_methods_own_settings(self, search, taught):
        _, lines = search(1, settings={"layer_weight": 2.0})
        assert lines[0]["settings"] == {}
        assert taught[0][0] == makd.MethodConfig(name="makd_paper", settings={"layer_weight": 2.0}).build()

    def test_trials_are_scored_on_training_rows_that_neither_student_nor_teacher_learns_from(self, done, setup):
        searched = replace(done[0], search=makd.SearchConfig(trials=1, held_out=0.25))
        cell = all_cells(searched)[0]
        first = searched_at(searched, cell)
        split = prepare_setup(searched, first.task, 1, quiet)
        (scored,) = split.task.evaluation.values()
        assert len(split.task.train) > len(scored) > 0
        rows = [*split.task.train["input_ids"], *scored["input_ids"]]
        assert sorted(rows) == sorted(setup.task.train["input_ids"])
        folder = teacher_folder(searched, first.task, 1)
        assert folder != teacher_folder(searched, cell.task, 1)
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        assert recipe["task"]["tuning"] == 0.25

    def test_no_trial_is_scored_on_or_taught_a_row_that_cells_are_measured_on(self, tmp_path):
        """Where the data have no split of their own both kinds of rows come from the training rows."""
        path = write(tmp_path / "own", train=[{"text": f"text {at}", "label": at % 2} for at in range(400)])
        task = makd.TaskConfig(name="classification", path=str(path))
        for share in (0.1, 0.2):  # as large as the search's, the rows were the very same
            searched = makd.SearchConfig(trials=1, held_out=0.2)
            experiment = makd.Experiment(
                teacher="unused", methods=(makd.MethodConfig(name="makd"),), budgets=(makd.Budget(keep_linears=0.5),),
                output=str(tmp_path / "out"), tasks=(replace(task, held_out=share),), search=searched,
            )  # fmt: skip
            cell = all_cells(experiment)[0]
            (measured,) = read_task(cell.task).evaluation.values()
            trial = read_task(searched_at(experiment, cell).task)
            (scored,) = trial.evaluation.values()
            assert 0.1 < len(scored) / (400 - len(measured)) < 0.3
            assert not set(measured["text"]) & {*scored["text"], *trial.train["text"]}
            assert len(scored) + len(trial.train) + len(measured) == 400

    def test_rows_that_a_choice_by_hand_is_made_on_are_not_searched_beside(self, done):
        task = replace(done[0].tasks[0], tuning=0.2)
        with pytest.raises(SettingError, match=r"mrpc has `tuning`.*Leave out one of them"):
            replace(done[0], tasks=(task,), search=makd.SearchConfig(trials=1))

    def test_a_search_on_one_task_holds_for_all_and_its_trials_share_a_cache(
        self, done, data, encoder_folder, tmp_path, monkeypatch
    ):
        built = []
        monkeypatch.setattr(caches, "write_cache", lambda *args: built.append(args) or write_cache(*args))
        experiment = make(
            data, encoder_folder, tmp_path / "one", seeds=(2,), cache=makd.CacheConfig(dtype="float32"),
            search=makd.SearchConfig(trials=2, task="stsb", steps=1),
        )  # fmt: skip
        lines = makd.compare(experiment, only="method=makd_paper")
        trials = read_lines(tmp_path / "one" / "search.jsonl")
        assert [(trial["task"], trial["method"]) for trial in trials] == 2 * [("stsb", "makd_paper")]
        best = max(trials, key=lambda trial: trial["score"])["settings"]
        assert all(best.items() <= line["settings"].items() for line in lines)
        search, *tasks = (len(args[1]) for args in built)
        assert (search < 12, tasks) == (True, [12, 12])  # the search's rows, then those of either task

    def test_a_search_that_is_done_needs_no_teacher(self, search, done, tmp_path):
        found, lines = search(3)
        makd_paper = makd.MethodConfig(name="makd_paper")
        experiment = replace(
            done[0], methods=(makd_paper,), search=makd.SearchConfig(trials=3, held_out=0.25),
            output=str(tmp_path / "searched"),
        )  # fmt: skip
        assert len(lines) == 3
        cell = all_cells(experiment)[0]
        job = Schedule(experiment, [cell]).take(None)
        assert (job.kind, job.cell, job.found) == (Kind.CELL, cell, found)

    def test_a_trial_that_diverges_has_no_score_and_the_search_goes_on(self, search, taught, monkeypatch, caplog):
        score = searching.teach

        def diverge(setup, method, *rest):
            if method.learning_rate > 1.5e-4:
                raise NumericsError("The loss of matrix is not finite.")
            return score(setup, method, *rest)

        monkeypatch.setattr(searching, "teach", diverge)
        found, lines = search(8)
        assert {line["score"] is None for line in lines} == {True, False}
        assert all(line["score"] is None or line["settings"].get("learning_rate", 0) <= 1.5e-4 for line in lines)
        assert found.get("learning_rate", 1e-4) <= 1.5e-4
        assert "The loss of matrix is not finite" in caplog.text
        monkeypatch.setattr(
            searching, "teach", lambda setup, method, *_: diverge(setup, replace(method, learning_rate=1.0))
        )
        assert search(2, "diverged")[0] == {}

    def test_more_trials_go_on_where_the_search_stood(self, search, taught):
        _, few = search(3)
        _, more = search(5)
        assert more[:3] == few
        assert len(taught) == 5

    def test_a_cell_whose_settings_a_search_finds_again_is_not_run_again(self, done, setup, taught, tmp_path):
        (row,) = (method for method in done[0].methods if method.name == "low_rank_svd")
        searched = replace(done[0], methods=(row,), search=makd.SearchConfig(trials=1))
        assert not comparison.done_lines(replace(searched, output=str(tmp_path)), all_cells(searched))
        assert not comparison.done_lines(searched, all_cells(searched))
        search_all(searched, all_cells(searched), setup)
        assert len(comparison.done_lines(searched, all_cells(searched))) == 4

    def test_methods_that_search_the_same_try_the_same_at_first(self, search):
        tried = [search(4, name, name=name)[1] for name in ("low_rank_svd", "low_rank_whitened")]
        first, other = ([line["settings"] for line in lines] for lines in tried)
        assert first == other

    def test_the_first_points_have_each_quarter_of_a_span_and_each_name(self):
        space = {"rate": Span(1e-4, 1.0), "share": Span(0.0, 2.0, False), "name": Choice(("a", "b", "c", "d"))}
        found = [spread_settings(space, number, seed=3) for number in range(4)]
        assert sorted(int(4 + math.log10(point["rate"])) for point in found) == [0, 1, 2, 3]
        assert sorted(int(2 * point["share"]) for point in found) == [0, 1, 2, 3]
        assert sorted(point["name"] for point in found) == ["a", "b", "c", "d"]
        assert found != [spread_settings(space, number, seed=4) for number in range(4)]

    def test_trials_are_within_the_space_and_differ(self, search):
        _, lines = search(8)
        drawn = [line["settings"] for line in lines[1:]]
        space = makd.MethodConfig(name="makd_paper").build().search
        assert all(space[name].holds(value) for found in drawn for name, value in found.items())
        assert all(found.keys() == space.keys() for found in drawn)
        assert len({found["learning_rate"] for found in drawn}) == 7

    def test_later_trials_are_nearer_to_the_best_than_random_ones(self, search):
        found, lines = search(24)
        distances = [abs(math.log10(line["settings"]["learning_rate"] / 5e-5)) for line in lines[1:]]
        assert sum(distances[-8:]) / 8 < sum(distances[:3]) / 3
        assert 3e-5 < found["learning_rate"] < 8e-5

    def test_a_stopped_search_goes_on_and_finds_the_same(self, search, taught, monkeypatch):
        whole = search(8, "whole")
        score = searching.teach

        def stop_at_the_seventh(*arguments):
            if len(taught) == 8 + 6:
                raise KeyboardInterrupt
            return score(*arguments)

        monkeypatch.setattr(searching, "teach", stop_at_the_seventh)
        with pytest.raises(KeyboardInterrupt):
            search(8, "stopped")
        monkeypatch.setattr(searching, "teach", score)
        assert search(8, "stopped") == whole
        assert len(taught) == 8 + 8
        assert search(8, "stopped") == whole
        assert len(taught) == 8 + 8

    def test_what_settings_fix_is_not_searched(self, search):
        found, lines = search(4, settings={"learning_rate": 3e-4})
        assert "layer_weight" in lines[1]["settings"]
        assert not any("learning_rate" in line["settings"] for line in lines)
        assert "learning_rate" not in found

    def test_only_what_the_search_names_is_searched(self, search):
        _, lines = search(4, names=("learning_rate",))
        assert all(line["settings"].keys() == {"learning_rate"} for line in lines[1:])

    def test_a_method_with_nothing_to_search_has_no_trials(self, search, taught):
        assert search(4, name="low_rank_svd", settings={"learning_rate": 3e-4}) == ({}, [])
        assert not taught

    def test_own_settings_outside_the_space_are_tried_and_not_shown_to_the_sampler(self, done):
        cell = next(cell for cell in all_cells(done[0]) if cell.method.name == "low_rank_svd")
        own, drawn = {"settings": {}}, {"settings": {"learning_rate": 5e-4}, "score": 0.5}
        higher = {"learning_rate": Span(2e-4, 1e-3)}
        assert propose(cell, higher, []) == {}

        def draws(space, own_score):
            return [propose(cell, space, [{**own, "score": own_score}, *more * [drawn]]) for more in range(4, 9)]

        assert draws(higher, 0.0) == draws(higher, 1.0)
        inside = search_space(done[0], cell.method)
        assert draws(inside, 0.0) != draws(inside, 1.0)

    def test_optuna_is_quiet_and_as_loud_as_before_afterwards(self, search, caplog, monkeypatch):
        before = optuna.logging.get_verbosity()
        monkeypatch.setattr(logging.getLogger("optuna"), "propagate", True)
        search(3)
        assert not [record for record in caplog.records if record.name.startswith("optuna")]
        assert optuna.logging.get_verbosity() == before

    def test_without_optuna_a_search_says_what_to_install_before_anything_is_run(
        self, data, encoder_folder, tmp_path, monkeypatch
    ):
        monkeypatch.setitem(sys.modules, "optuna", None)
        trials = makd.SearchConfig(trials=2)
        with pytest.raises(SettingError, match=r"pip install makd\[compare\]"):
            makd.compare(make(data, encoder_folder, tmp_path / "none", search=trials))
        assert not (tmp_path / "none").exists()


class TestPage:
    def test_the_page_has_every_method_the_teacher_the_majority_and_what_was_paid(self, done, tmp_path):
        experiment, lines = done
        page = comparison.write_page(experiment, tmp_path / "page.md").read_text()
        assert "8 of 8 cells" in page
        own = [line["score"] for line in lines if line["cell"]["method"] == "low_rank_svd"]
        assert f"| `low_rank_svd` | {100 * (own[0] + own[2]) / 2:.2f} ± " in page  # mrpc of both seeds
        assert "the best baseline" in page
        row = next(line for line in page.splitlines() if line.startswith("| `makd_paper`"))
        assert ", n 4 |" in row
        assert "| *teacher* |" in page
        assert f"| {lines[0]['params']['student']['linears']:,} |" in page
        assert "learning_rate 0.0001" in page

    def test_the_report_has_the_pages_tables_the_frontier_and_paired_differences(self, done, tmp_path):
        experiment, lines = done
        text = comparison.write_comparison_report(experiment, tmp_path / "grid.html").read_text()
        own = [line["score"] for line in lines if line["cell"]["method"] == "low_rank_svd"]
        assert f"{100 * (own[0] + own[2]) / 2:.2f} ± " in text  # mrpc of both seeds
        specs = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', text)]
        frontier = next(one for one in specs if one["description"].startswith("Quality against size"))
        first, *others = frontier["data"]["values"]
        scores = np.array([[line["score"] for line in lines if line["cell"]["method"] == first["method"]
                            and line["cell"]["seed"] == seed] for seed in (1, 2)]).mean(1)  # fmt: skip
        theirs = np.array([[line["teacher"]["score"] for line in lines if line["cell"]["method"] == first["method"]
                            and line["cell"]["seed"] == seed] for seed in (1, 2)]).mean()  # fmt: skip
        assert first["quality"] == pytest.approx(100 * scores.mean() / theirs)
        assert first["error"] == pytest.approx(100 * scores.std(ddof=1) / 2**0.5 / theirs)
        differences = next(one for one in specs if one["description"].startswith("Paired differences"))
        other = others[0]["method"]
        by_cell = {tuple(line["cell"].values()): line["score"] for line in lines}
        gains = np.array([
            score - by_cell[task, other, seed, budget]
            for (task, method, seed, budget), score in by_cell.items() if method == first["method"]
        ])  # fmt: skip
        row = next(one for one in differences["data"]["values"] if one["name"] == other)
        assert row["gain"] == pytest.approx(100 * gains.mean())
        by_task = gains.reshape(2, 2)  # cells stand by seed, then by task
        assert row["high"] - row["gain"] == pytest.approx(100 * (by_task.var(0, ddof=1).mean() / gains.size) ** 0.5)

    def made_up(self, done, folder, scores):
        """An experiment whose cells have these scores, by method and seed, of every task."""
        methods = tuple(makd.MethodConfig(name=name) for name in scores)
        experiment = replace(done[0], output=str(folder), methods=methods)
        for cell in all_cells(experiment):
            if cell.seed in scores[cell.method.name]:
                line = {**done[1][0], "cell": cell.names, "hash": cell_hash(experiment, cell, {})}
                del line["rows"]
                append_line(folder / RESULTS_FILE, {**line, "score": scores[cell.method.name][cell.seed]})
        return experiment

    def test_one_seed_has_no_standard_error_and_is_no_evidence(self, done, tmp_path):
        scores = {"makd_paper": {1: 0.51}, "low_rank_svd": {1: 0.5}, "pkd": {1: 0.49}}
        experiment = self.made_up(done, tmp_path, scores)
        text = comparison.write_comparison_report(experiment, tmp_path / "grid.html").read_text()
        assert "of one seed, without an SE" in text
        assert "One seed has no standard error: nothing of this can be told from chance" in text
        specs = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', text)]
        frontier = next(one for one in specs if one["description"].startswith("Quality against size"))
        assert [row["error"] for row in frontier["data"]["values"]] == [None] * 3

    def test_a_row_of_fewer_seeds_is_no_best_one(self, done, tmp_path):
        scores = {"makd_paper": {1: 0.5, 2: 0.6}, "low_rank_svd": {1: 0.4, 2: 0.5}, "pkd": {2: 0.9}}
        experiment = self.made_up(done, tmp_path, scores)
        text = comparison.write_comparison_report(experiment, tmp_path / "grid.html").read_text()
        assert '<p class="answer">makd_paper</p>' in text
        page = comparison.write_page(experiment, tmp_path / "page.md").read_text()
        (reference,) = [line for line in page.splitlines() if line.endswith(" | the best baseline |")]
        assert reference.startswith("| `low_rank_svd` |")

    def test_two_rows_that_come_to_the_same_settings_both_stand_there(self, done, tmp_path):
        rows = (makd.MethodConfig(name="makd"), makd.MethodConfig(name="twin", method="makd"))
        experiment = replace(done[0], output=str(tmp_path), methods=rows)
        for cell in all_cells(experiment):
            line = {**done[1][0], "cell": cell.names, "hash": cell_hash(experiment, cell, {})}
            append_line(tmp_path / RESULTS_FILE, line)
        assert len({line["hash"] for line in read_lines(tmp_path / RESULTS_FILE)}) == 4
        assert len(comparison.done_lines(experiment, all_cells(experiment))) == 8

    def test_the_report_replaces_a_report_and_nothing_else(self, done, tmp_path):
        for _ in range(2):
            comparison.write_comparison_report(done[0], tmp_path / "grid.html")
        (tmp_path / "grid.html").write_text("precious")
        with pytest.raises(OutputError, match="no report that makd wrote"):
            comparison.write_comparison_report(done[0], tmp_path / "grid.html")

    def test_what_was_not_timed_or_set_takes_no_room(self, done, tmp_path):
        experiment, lines = done
        told = {**lines[0]["settings"], "layers": None}
        here = replace(experiment, output=str(tmp_path))
        for line in lines:
            append_line(tmp_path / RESULTS_FILE, {**line, "settings": told})
        page = comparison.write_page(here, tmp_path / "page.md").read_text()
        assert "| seconds |\n" in page
        assert "layers" not in page

    def test_a_page_of_nothing_says_what_to_run(self, data, encoder_folder, tmp_path):
        for name in ("thesis.md", "thesis.svg"):
            (tmp_path / name).write_text("precious")
            with pytest.raises(OutputError, match=f"{name} is there, and not of a page"):
                comparison.write_page(make(data, encoder_folder, tmp_path / "none"), tmp_path / "thesis.md")
            assert (tmp_path / name).read_text() == "precious"
            (tmp_path / name).unlink()
        with pytest.raises(OutputError, match="makd compare"):
            comparison.write_page(make(data, encoder_folder, tmp_path / "none"), tmp_path / "page.md")

    def test_budgets_make_a_plot(self, done, tmp_path):
        assert "page.svg" in self.write_two_budgets(done, tmp_path)
        plot = ElementTree.parse(tmp_path / "page.svg").getroot()
        texts = {element.text for element in plot.iter() if element.tag.endswith("text")}
        assert {
            "low_rank_svd",
            "makd_paper",
            "parameters, of the teacher's",
            "average score, of the teacher's",
        } <= texts

    def write_two_budgets(self, done, tmp_path):
        experiment, lines = done
        two = replace(experiment, output=str(tmp_path), budgets=(*experiment.budgets, makd.Budget(keep_linears=0.8)))
        for cell in all_cells(two):
            copied = {**lines[0], "cell": cell.names, "hash": cell_hash(two, cell, {}), "score": 0.5}
            copied["teacher"] = {"score": 0.5 + 0.1 * cell.budget.keep_linears}
            append_line(tmp_path / RESULTS_FILE, copied)
        return comparison.write_page(two, tmp_path / "page.md").read_text()

    def test_without_matplotlib_the_page_has_no_plot_and_the_log_says_what_brings_it(
        self, done, tmp_path, monkeypatch, caplog
    ):
        monkeypatch.setattr(pages, "can_draw", lambda: False)
        page = self.write_two_budgets(done, tmp_path)
        assert "page.svg" not in page
        assert not (tmp_path / "page.svg").exists()
        assert "pip install makd[compare]" in caplog.text

    def test_a_flat_line_can_be_drawn_and_the_same_curves_make_the_same_file(self, tmp_path):
        for name in ("one.svg", "other.svg"):
            draw({"a": [(0.3, 0.5), (0.6, 0.5)]}, "size", "quality", tmp_path / name)
        assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()

    def test_a_row_with_more_steps_says_so(self, done, tmp_path):
        longer = makd.MethodConfig(name="longer", method="low_rank_svd", times_steps=1.5)
        experiment = replace(done[0], output=str(tmp_path), methods=(longer,), seeds=(1,))
        for cell in all_cells(experiment):
            append_line(
                tmp_path / RESULTS_FILE, {**done[1][0], "cell": cell.names, "hash": cell_hash(experiment, cell, {})}
            )
        assert (
            "| `longer` | 1.5 times the steps; start svd"
            in comparison.write_page(experiment, tmp_path / "page.md").read_text()
        )

    def test_our_own_methods_are_no_baselines(self, done):
        assert best_baseline(done[0], {"makd_paper": {("mrpc", 1): 1.0}}, ["mrpc"]) is None

    def test_without_baselines_rows_are_compared_with_the_first(self, done, tmp_path):
        methods = tuple(
            makd.MethodConfig(name=name, method="makd_paper", settings={"layer_weight": weight})
            for name, weight in (("whole", 1.0), ("half", 0.5))
        )
        experiment = replace(done[0], output=str(tmp_path), methods=methods)
        for cell in all_cells(experiment):
            line = {**done[1][0], "cell": cell.names, "hash": cell_hash(experiment, cell, {})}
            score = 0.5 if cell.method.name == "whole" else 0.4
            append_line(tmp_path / RESULTS_FILE, {**line, "score": score})
        page = comparison.write_page(experiment, tmp_path / "page.md").read_text()
        assert "difference to `whole` |" in page
        told = [line.rpartition(" % | ")[2] for line in page.splitlines() if line.startswith(("| `whole`", "| `half`"))]
        assert told[:2] == ["`whole` |", "-10.00, n 4 |"]
        assert " minus " not in page

    def test_the_first_rows_lead_over_each_other_one_is_told_by_task(self, done, tmp_path):
        names = ("makd_paper", "low_rank_svd", "pkd", "minilm")
        experiment = replace(
            done[0], output=str(tmp_path), methods=tuple(makd.MethodConfig(name=name) for name in names)
        )
        scores = {"makd_paper": 0.5, "low_rank_svd": 0.4, "pkd": 0.3}
        for cell in all_cells(experiment):
            name = cell.method.name
            if name in scores:
                gain = 0.1 if name == "pkd" and cell.names["task"] == "stsb" and cell.seed == 2 else 0.0
                line = {**done[1][0], "cell": cell.names, "hash": cell_hash(experiment, cell, {})}
                append_line(tmp_path / RESULTS_FILE, {**line, "score": scores[name] + gain})
        page = comparison.write_page(experiment, tmp_path / "page.md").read_text().splitlines()
        start = page.index("| `makd_paper` minus | mrpc | stsb | all |")
        assert page[start + 2].startswith("| `low_rank_svd` | 10.00 ± 0.00 | 10.00 ± 0.00 | +10.00, n 4 |")
        assert page[start + 3].startswith(
            "| `pkd` | 20.00 ± 0.00 | 15.00 ± 5.00 "
            "| +17.50 = +7.0 SE over seeds (p 0.02), +7.0 SE over tasks (p 0.09), n 4 |"
        )
        assert page[start + 4] == ""  # no cell of `minilm` was run

    def test_the_majority_class_is_that_of_the_training_rows(self, done, setup):
        _, lines = done
        rows = setup.task.train
        assert majority_score(setup.task) == lines[0]["majority"]
        one = replace(setup.task, train=rows.select([i for i, label in enumerate(rows["label"]) if int(label) == 1]))
        assert majority_score(one) == pytest.approx((0.5 + 2 / 3) / 2)


class TestStatistics:
    def test_means_and_errors_are_those_of_textbooks(self):
        found = mean([1.0, 2.0, 3.0])
        assert (found.value, found.count) == (2.0, 3)
        assert found.error == pytest.approx(1 / 3**0.5)
        assert mean([1.0]).error is None
        assert mean([]) is None

    def test_the_average_is_of_seeds_that_have_every_task(self):
        found = {("a", 1): 0.2, ("b", 1): 0.4, ("a", 2): 0.9}
        assert average(found, ["a", "b"]).value == pytest.approx(0.3)
        assert average({("a", 1): 0.2}, ["a", "b"]) is None

    def test_differences_are_paired(self):
        ours = {("a", 1): 0.5, ("a", 2): 0.9, ("b", 1): 0.4, ("c", 9): 1.0}
        gains = pairs(ours, {("a", 1): 0.4, ("a", 2): 0.7, ("b", 1): 0.1})
        assert gains == pytest.approx({("a", 1): 0.1, ("a", 2): 0.2, ("b", 1): 0.3})

    def test_every_task_counts_the_same_in_a_difference_however_many_seeds_it_has(self):
        gains = {("a", 1): 0.1, ("a", 2): 0.2, ("b", 1): 0.3}
        assert difference(gains).mean == pytest.approx((0.15 + 0.3) / 2)
        assert difference({}) is None

    def test_over_tasks_a_difference_has_the_spread_of_their_means_and_more_seeds_tell_nothing_more(self):
        means = {"a": 2.0, "b": 0.1, "c": -0.1, "d": 0.0}
        for seeds in (2, 20):
            gains = {(task, seed): mean + 0.1 * (-1) ** seed for task, mean in means.items() for seed in range(seeds)}
            found = difference(gains).over_tasks
            expected = ttest_1samp(list(means.values()), 0)
            assert (found.count, found.probability) == pytest.approx((expected.statistic, expected.pvalue))
        assert difference({("a", 1): 0.1, ("a", 2): 0.3}).over_tasks is None

    def test_over_seeds_a_difference_has_the_spread_within_tasks_and_not_what_tasks_differ_by(self):
        gains = {("a", 1): 0.4, ("a", 2): 0.6, ("b", 1): 0.0, ("b", 2): 0.1, ("b", 3): -0.1}
        found = difference(gains)
        design = np.array([[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 3)  # a mean for each task, by least squares
        (squares,) = np.linalg.lstsq(design, np.array(list(gains.values())))[1]
        share = np.full(2, 0.5)  # of each task's mean in the mean of all
        error = (squares / 3 * share @ np.linalg.inv(design.T @ design) @ share) ** 0.5
        assert found.over_seeds.count == pytest.approx(found.mean / error)
        assert found.over_seeds.probability == pytest.approx(2 * t.sf(found.mean / error, 3))
        one_each = {key: value for key, value in gains.items() if key[1] == 1}
        assert difference(one_each).over_seeds is None
        assert difference(dict.fromkeys(gains, 0.1)).over_seeds is None

    def test_of_one_task_it_is_the_paired_t_test(self):
        found = difference({("a", 1): 0.1, ("a", 2): 0.2, ("a", 3): 0.3}).over_seeds
        expected = ttest_1samp([0.1, 0.2, 0.3], 0)
        assert (found.count, found.probability) == pytest.approx((expected.statistic, expected.pvalue))


class TestForecast:
    def test_a_cell_takes_what_its_task_and_method_take_elsewhere(self, done):
        cells = all_cells(done[0])
        seconds = {"mrpc": 2.0, "stsb": 3.0, "low_rank_svd": 5.0, "makd_paper": 7.0}
        lines = [
            {
                "cell": cell.names,
                "seconds": {"total": seconds[str(cell.names["task"])] * seconds[str(cell.names["method"])]},
            }
            for cell in cells
        ]
        told = ("stsb", "makd_paper")
        known = [line for line in lines if (line["cell"]["task"], line["cell"]["method"]) != told]
        wanted = [cell for cell in cells if (cell.names["task"], cell.names["method"]) == told]
        assert forecast_seconds(wanted, known) == pytest.approx(len(wanted) * 3.0 * 7.0)

    def test_what_no_line_has_is_like_the_others(self, done):
        cell = all_cells(done[0])[0]
        lines = [{"cell": cell.names, "seconds": {"total": 4.0}}]
        other = replace(cell, budget=makd.Budget(keep=0.5))
        assert forecast_seconds([other], lines) == pytest.approx(4.0)
        assert forecast_seconds([], lines) == 0.0
        with pytest.raises(ValueError, match="nothing is done yet"):
            forecast_seconds([cell], [])


class TestCommand:
    @pytest.fixture
    def file(self, done, tmp_path):
        from makd.report import plain

        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(plain(done[0])))
        return str(path)

    def test_the_file_is_the_object(self, done, file):
        assert load_experiment(file) == done[0]
        assert load_experiment(file, output="elsewhere").output == "elsewhere"

    def test_what_is_done_is_shown_without_a_run(self, file, capsys):
        assert main(["compare", file, "--only", "task=mrpc,seed=1", "--dry_run"]) == 0
        out = capsys.readouterr().out
        assert out.count("done  mrpc") == 2
        assert "2 of 2 cells are done" in out
        assert "0.0 hours of one process\n" in out

    def test_what_the_others_will_take_is_told(self, file, done, tmp_path, capsys):
        folder = tmp_path / "some"
        folder.mkdir()
        for line in done[1][:2]:
            append_line(folder / RESULTS_FILE, {**line, "seconds": {"total": 4500.0, "cache": 900.0}})
        assert main(["compare", file, "--output", str(folder), "--dry_run"]) == 0
        assert "2.0 hours of one process; the others will take about " in capsys.readouterr().out

    def test_cells_that_are_there_are_printed(self, file, capsys):
        assert main(["compare", file]) == 0
        assert "8 of 8 cells are done" in capsys.readouterr().out

    def test_the_page_is_written(self, file, capsys, tmp_path):
        assert main(["compare", file, "--table", str(tmp_path / "page.md")]) == 0
        assert "standard error" in (tmp_path / "page.md").read_text()
        assert "page.md" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "told"),
        [
            (["--only", "method=makd"], "Known: low_rank_svd, makd_paper"),
            (["--limit", "0"], "at least 1"),
            (["--workers", "0"], "at least 1 process"),
            (["--table", "x.md", "--limit", "1"], "leave out"),
        ],
    )
    def test_wrong_flags_are_told(self, file, words, told, capsys):
        assert main(["compare", file, *words]) == 2
        assert told in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"methods": [{"name": "mackd"}]}, "Did you mean 'makd'"),
            ({"tasks": [{"name": "glue/colla"}]}, "glue/cola"),
            ({"sedes": [1]}, "sedes"),
        ],
    )
    def test_wrong_files_are_told(self, file, changes, told, tmp_path, capsys):
        content = yaml.safe_load(Path(file).read_text())
        (tmp_path / "wrong.yaml").write_text(json.dumps({**content, **changes}))
        assert main(["compare", str(tmp_path / "wrong.yaml")]) == 2
        assert told in capsys.readouterr().err

    def test_a_file_that_is_not_there_is_told(self, capsys):
        assert main(["compare", "nowhere.yaml"]) == 2
        assert "no file" in capsys.readouterr().err


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
