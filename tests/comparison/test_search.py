"""A search for a method's settings: its trials, what it chooses, and what is not run again."""

import logging
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import optuna
import pytest
import yaml

import makd
from makd import comparison
from makd.baselines import BASELINES, Choice, Span
from makd.cache import write_cache
from makd.comparison import caches, settings
from makd.comparison import search as searching
from makd.comparison.cells import all_cells, spaceless_hashes, trial_hash
from makd.comparison.results import read_lines
from makd.comparison.schedule import Kind, Schedule
from makd.comparison.search import propose, read_trials, search_space, searched_at, spread_settings
from makd.comparison.setup import prepare_setup, teacher_folder
from makd.errors import NumericsError, SettingError
from makd.registry import Registry
from makd.tasks.rows import read_task
from tests.comparison.experiments import make, quiet, search_all
from tests.tasks.test_tasks import write


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

    @pytest.fixture
    def searched(self, data, encoder_folder, tmp_path):
        """An experiment that searches a learning rate alone, and the cell of its trials."""
        rows = (makd.MethodConfig(name="low_rank_svd"),)
        experiment = make(data, encoder_folder, tmp_path, methods=rows, search=makd.SearchConfig(trials=4))
        return experiment, searched_at(experiment, all_cells(experiment)[0])

    def test_a_trial_of_another_space_than_the_methods_present_one_is_none_of_its_search(self, searched, monkeypatch):
        line = {"trial": 0, "hash": trial_hash(*searched), "settings": {}}
        assert read_trials(*searched, [line]) == {0: line}
        other = replace(BASELINES["low_rank_svd"], search={"learning_rate": Span(1e-5, 1e-4)})
        monkeypatch.setattr(settings, "BASELINES", Registry("baseline", {**BASELINES, "low_rank_svd": other}))
        assert not read_trials(*searched, [line])

    def test_trials_from_before_the_space_counted_stay_where_it_has_what_they_tried(self, searched):
        tried = ({}, {"learning_rate": 1e-4}, {"learning_rate": 1.0}, {"learning_rate": 1e-4, "gone": 2.0})
        for identity in spaceless_hashes(*searched):
            lines = [{"trial": number, "hash": identity, "settings": one} for number, one in enumerate(tried)]
            assert read_trials(*searched, lines).keys() == {0, 1}

    def test_only_what_the_search_names_is_searched(self, search):
        _, lines = search(4, names=("learning_rate",))
        assert all(line["settings"].keys() == {"learning_rate"} for line in lines[1:])

    def test_a_method_with_nothing_to_search_has_no_trials(self, search, taught):
        assert search(4, name="low_rank_svd", settings={"learning_rate": 3e-4}) == ({}, [])
        assert not taught

    def test_a_row_that_is_never_taught_has_no_trials(self, search, taught):
        assert search(4, name="start", method="low_rank_svd", times_steps=0.0) == ({}, [])
        assert not taught

    @pytest.mark.parametrize("settings", [{"preset": "kd"}, {"without": "matrix"}, {"layers": "last:1"}])
    def test_a_row_with_settings_of_its_own_has_all_of_its_trials(self, search, taught, settings):
        _, lines = search(6, name="makd", settings=settings)
        assert [line["trial"] for line in lines] == [0, 1, 2, 3, 4, 5]
        assert all(getattr(method, name) == value for method, _ in taught for name, value in settings.items())

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
        with pytest.raises(SettingError, match=r"pip install 'makd\[compare\]'"):
            makd.compare(make(data, encoder_folder, tmp_path / "none", search=trials))
        assert not (tmp_path / "none").exists()
