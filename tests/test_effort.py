"""`--effort` and `makd.effort`: three recipes, over which whatever a user sets wins."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

import makd
from makd.efforts import EFFORTS, settings_of
from makd.run_folder import plain

TASK = makd.TaskConfig(name="glue/mrpc", path="rows")


@pytest.fixture
def recipe_of(run, monkeypatch, tmp_path):
    """The recipe that `makd compress` would begin with, and what it says of it."""
    from makd import pipeline

    found = []

    def stop(teacher, data, budget, recipe, output, **_):
        found.append(recipe)
        raise makd.MakdError("begun")

    assert makd.compress is pipeline.compress  # the package keeps what it was asked for first
    monkeypatch.setattr(pipeline, "compress", stop)

    def recipe(*words, of=("--data.path", "y.txt")):
        given = ["--teacher", "x", "--budget.keep", "0.5", *of, "--output", tmp_path / "z"]
        code, _, err = run("compress", *given, *words)
        assert code == 2
        assert found, err
        return found.pop(), err

    return recipe


@pytest.mark.parametrize("name", EFFORTS)
def test_the_command_and_python_mean_the_same(name, recipe_of):
    recipe, err = recipe_of("--effort", name)
    assert recipe == makd.effort(name)
    how_long = f"then {recipe.training.steps:,} steps" if recipe.training.steps else "and no training"
    assert f"effort {name}: {recipe.calibration.rows:,} rows to calibrate, {how_long}" in err


@pytest.mark.parametrize("name", [name for name in EFFORTS if name != "quick"])
def test_a_task_is_learned_in_passes_over_its_rows(name, recipe_of):
    recipe, err = recipe_of("--effort", name, of=("--task", "glue/mrpc", "--task_data", "rows"))
    assert recipe == makd.effort(name, TASK)
    assert recipe.training.steps is None
    assert f"then {recipe.training.epochs:g} epochs of 32 rows" in err


def test_the_rows_of_the_task_that_a_teacher_was_made_with_are_a_task(recipe_of, tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    (tmp_path / "teacher" / "recipe.yaml").write_text(yaml.safe_dump({"task": {"name": "glue/mrpc", "path": "rows"}}))
    recipe, _ = recipe_of("--effort", "normal", of=("--teacher", tmp_path / "teacher"))
    assert recipe == makd.effort("normal", TASK)


@pytest.mark.parametrize("data", [None, TASK])
@pytest.mark.parametrize("name", EFFORTS)
def test_every_setting_of_an_effort_is_in_its_recipe(name, data):
    recipe = plain(makd.effort(name, data))
    for setting, value in settings_of(name, data).items():
        part, leaf = setting.split(".")
        assert recipe[part][leaf] == value


def test_the_tables_in_the_reference_are_those_of_the_code():
    page = (Path(__file__).parents[1] / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    for name in EFFORTS:
        text, task = makd.effort(name), makd.effort(name, TASK)
        steps, epochs = (
            ("no training", "no training")
            if text.training.steps == 0
            else (
                f"{text.training.steps:,} steps of {text.training.batch_size}",
                f"{task.training.epochs:g} epochs of {task.training.batch_size}",
            )
        )
        of_text, of_task = f"{text.calibration.rows:,} rows, {steps}", f"{task.calibration.rows:,} rows, {epochs}"
        rates = [f"{one.training.learning_rate * 1e4:g}e-4" for one in (text, task)]
        assert f"| `{name}` | {of_text} | {of_task} |" in page
        assert f"learning rate {' and '.join(rates)}" in page


def test_more_effort_is_more_text_and_more_steps():
    quick, normal, best = map(makd.effort, EFFORTS)
    assert quick.calibration.rows < normal.calibration.rows < best.calibration.rows
    assert quick.training.steps < normal.training.steps < best.training.steps
    quick, normal, best = (makd.effort(name, TASK) for name in EFFORTS)
    assert quick.training.steps == 0
    assert normal.training.epochs < best.training.epochs


def test_without_it_nothing_changes(recipe_of):
    recipe, err = recipe_of()
    assert recipe == makd.Recipe()
    assert "effort" not in err


def test_flags_and_files_win(recipe_of, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"recipe": {"plan": {"preset": "fast"}}, "effort": "quick"}))
    recipe, err = recipe_of("--config", tmp_path / "mine.yaml", "--recipe.training.steps", "7")
    assert recipe.plan.preset == "fast"
    assert recipe.training.steps == 7
    assert recipe.calibration.rows == makd.effort("quick").calibration.rows
    assert "7 steps of 16 rows, plan fast" in err


@pytest.mark.parametrize("epochs", [2.0, makd.TrainingConfig().epochs])
@pytest.mark.parametrize("where", ["flag", "part", "file"])
def test_epochs_that_are_asked_for_are_not_lost_to_its_steps(recipe_of, tmp_path, epochs, where):
    training = {"training": {"epochs": epochs}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"recipe": training}))
    words = {
        "flag": ["--recipe.training.epochs", epochs],
        "part": ["--recipe", json.dumps(training)],
        "file": ["--config", tmp_path / "mine.yaml"],
    }
    recipe, err = recipe_of("--effort", "quick", *words[where])
    assert recipe.training.steps is None
    assert f"then {epochs:g} epochs" in err


def test_stages_that_are_asked_for_have_plans_and_trainings_of_their_own(recipe_of):
    stages = [{"training": {"steps": 3}}, {"plan": {"preset": "logits"}}]
    recipe, err = recipe_of("--effort", "normal", "--recipe.stages", json.dumps(stages))
    assert recipe.stages == (
        makd.Stage(training=makd.TrainingConfig(steps=3)),
        makd.Stage(plan=makd.Plan(preset="logits")),
    )
    assert recipe.calibration == makd.effort("normal").calibration
    assert "800 rows to calibrate, then the recipe's own 2 stages" in err


def test_an_unknown_one_offers_the_nearest(run):
    words = ["compress", "--teacher", "x", "--budget.keep", "0.5", "--data.path", "y.txt", "--output", "z"]
    code, _, err = run(*words, "--effort", "quik")
    assert code == 2
    assert "Did you mean 'quick'" in err
    with pytest.raises(makd.MakdError, match="Known: quick, normal, best"):
        makd.effort("most")


def test_a_part_can_be_changed_in_python():
    quick = makd.effort("quick")
    changed = dataclasses.replace(quick, training=dataclasses.replace(quick.training, steps=3))
    assert changed.training.learning_rate == quick.training.learning_rate
