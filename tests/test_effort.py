"""`--effort` and `makd.effort`: three recipes, over which whatever a user sets wins."""

import dataclasses
from pathlib import Path

import pytest
import yaml

import makd
from makd.efforts import EFFORTS, settings_of
from makd.report import plain


class Chosen(Exception):
    """What the command would have begun with."""


@pytest.fixture
def recipe_of(run, monkeypatch, tmp_path):
    """The recipe that `makd compress` would begin with, and what it says of it."""
    from makd import pipeline

    found = []

    def stop(teacher, data, budget, recipe, output, **_):
        found.append(recipe)
        raise makd.MakdError("begun")

    monkeypatch.setattr(pipeline, "compress", stop)

    def recipe(*words):
        given = ["--teacher", "x", "--budget.keep", "0.5", "--data.path", "y.txt", "--output", tmp_path / "z"]
        code, _, err = run("compress", *given, *words)
        assert code == 2
        assert found, err
        return found.pop(), err

    return recipe


@pytest.mark.parametrize("name", EFFORTS)
def test_the_command_and_python_mean_the_same(name, recipe_of):
    recipe, err = recipe_of("--effort", name)
    assert recipe == makd.effort(name)
    assert f"effort {name}: {recipe.calibration.rows:,} rows to calibrate, then {recipe.training.steps} steps" in err


@pytest.mark.parametrize("name", EFFORTS)
def test_every_setting_of_an_effort_is_in_its_recipe(name):
    recipe = plain(makd.effort(name))
    for setting, value in settings_of(name).items():
        part, leaf = setting.split(".")
        assert recipe[part][leaf] == value


def test_the_table_in_the_reference_is_that_of_the_code():
    page = (Path(__file__).parents[1] / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")
    for name in EFFORTS:
        wanted = settings_of(name)
        cells = [wanted["calibration.rows"], wanted["training.steps"], f"`{wanted['plan.preset']}`"]
        rate = f"{wanted['training.learning_rate']:g}".replace("e-0", "e-")
        assert f"| `{name}` | {' | '.join(map(str, [*cells, rate]))} |" in page


def test_more_effort_is_more_text_and_more_steps():
    quick, normal, best = map(makd.effort, EFFORTS)
    assert quick.calibration.rows < normal.calibration.rows < best.calibration.rows
    assert quick.training.steps < normal.training.steps < best.training.steps


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


def test_epochs_that_are_asked_for_are_not_lost_to_its_steps(recipe_of):
    recipe, err = recipe_of("--effort", "quick", "--recipe.training.epochs", "2")
    assert recipe.training.steps is None
    assert "then 2 epochs" in err


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
