"""The settings of a comparison: what they may be, and which cells they make."""

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import makd
from makd.aspects import PRESETS
from makd.baselines import BASELINES, LowRankLogits
from makd.cli.compare import load_experiment
from makd.comparison import search as searching
from makd.comparison.cells import all_cells, cell_hash
from makd.comparison.search import known_settings
from makd.comparison.settings import short_name
from makd.comparison.setup import place_data
from makd.errors import DataError, SettingError, UnknownNameError
from makd.registry import Registry
from tests.comparison.experiments import TRAINING, make

ROOT = Path(__file__).parents[2]


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

    @pytest.mark.parametrize(
        ("settings", "left"),
        [
            ({}, {"learning_rate", "preset", "layer_weight", "task_weight"}),
            ({"preset": "logits"}, {"learning_rate", "task_weight"}),
            ({"preset": "kd"}, {"learning_rate", "task_weight"}),
            ({"preset": "gkd"}, {"learning_rate"}),
            ({"preset": "fast", "without": "hidden"}, {"learning_rate", "layer_weight", "task_weight"}),
        ],
    )
    def test_a_search_tries_what_goes_with_the_settings_of_a_row(self, settings, left):
        assert makd.MethodConfig(name="makd", settings=settings).search_space().keys() == left

    @pytest.mark.parametrize(
        ("settings", "left"),
        [
            ({}, ("full", "balanced", "fast")),
            ({"without": "matrix"}, ("full", "balanced")),
            ({"without": "hidden"}, ("full", "balanced", "fast")),
            ({"layers": "last:2"}, ("balanced", "fast")),
        ],
    )
    def test_of_the_presets_those_are_tried_that_have_what_a_row_changes(self, settings, left):
        assert makd.MethodConfig(name="makd", settings=settings).search_space()["preset"].values == left

    @pytest.mark.parametrize("name", BASELINES)
    def test_every_row_that_can_be_built_can_be_searched(self, name):
        own = BASELINES[name]
        fixed = {field: allowed.ends for field, allowed in own.search.items()}
        if name == "makd":
            fixed |= {"preset": tuple(preset for preset in PRESETS if not PRESETS[preset].completions.adaptive)}
            fixed |= {"without": ("matrix", "hidden", "attention", "logits", "task"), "layers": ("last:2",)}
        for field, values in fixed.items():
            for value in values:
                makd.MethodConfig(name=name, settings={field: value}).check_search()

    def test_hyper_parameters_that_do_not_go_together_are_refused_before_a_teacher_is_made(
        self, data, encoder_folder, tmp_path, monkeypatch
    ):
        @dataclass(frozen=True, kw_only=True)
        class Soft(LowRankLogits):
            def __post_init__(self):
                if self.temperature == 8.0 and self.task_weight > 1:
                    raise SettingError("They are too soft.")

        monkeypatch.setattr("makd.comparison.settings.BASELINES", Registry("baseline", {**BASELINES, "soft": Soft()}))
        method, trials = makd.MethodConfig(name="soft"), makd.SearchConfig(trials=2)
        told = r"A search of soft would try .*temperature 8.0, task_weight 10.0, which .*: They are too soft\. Fix one"
        with pytest.raises(SettingError, match=told):
            make(data, encoder_folder, tmp_path, methods=(method,), search=trials)
        make(data, encoder_folder, tmp_path, methods=(method,), search=replace(trials, settings=("learning_rate",)))

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
