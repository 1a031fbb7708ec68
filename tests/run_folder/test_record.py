"""What a run leaves beside its student works from anywhere."""

import yaml

from makd.data import DataConfig
from makd.run_folder import write_recipe
from makd.tasks import TaskConfig


def written(folder, **settings):
    write_recipe(folder, settings)
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def test_files_that_are_there_are_named_from_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("a text")
    (tmp_path / "model").mkdir()
    known = written(tmp_path, teacher="model", tokenizer="./model", data=DataConfig(path="texts.txt"))
    assert known["teacher"] == known["tokenizer"] == str(tmp_path / "model")
    assert known["data"]["path"] == str(tmp_path / "texts.txt")
    task = TaskConfig(name="classification", path="model", extra_text="texts.txt")
    known = written(tmp_path, task=task, recipe={"cache": "model"}, tokenizer=None)["task"]
    assert (known["path"], known["extra_text"]) == (str(tmp_path / "model"), str(tmp_path / "texts.txt"))
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["recipe"]["cache"] == str(tmp_path / "model")


def test_names_that_are_no_files_here_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("glue", "org/model", "package:some_package/model", "x" * 300):
        known = written(tmp_path, teacher=name, data={"path": name})
        assert known == {"teacher": name, "data": {"path": name}}
    assert written(tmp_path, data=None, task=None, recipe={}) == {"data": None, "task": None, "recipe": {}}


def test_the_built_in_text_is_no_file_whatever_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pydoc").write_text("another text")
    assert written(tmp_path, data=DataConfig(path="pydoc"))["data"]["path"] == "pydoc"
