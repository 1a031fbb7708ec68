"""A file of measurements: refused before the work where it cannot be written, whole at the end."""

import json
import os

import pytest

from makd.errors import OutputError
from makd.report import OutputFile


def test_missing_folders_are_made_before_the_work(tmp_path):
    file = OutputFile(tmp_path / "not" / "there" / "scores.json")
    assert (tmp_path / "not" / "there").is_dir()
    file.write({"a": 1})
    assert json.loads((tmp_path / "not" / "there" / "scores.json").read_text()) == {"a": 1}
    assert os.listdir(tmp_path / "not" / "there") == ["scores.json"]


def test_a_file_that_is_there_is_replaced_only_when_asked(tmp_path):
    (tmp_path / "thesis.json").write_text("precious")
    with pytest.raises(OutputError, match=r"exists\. Name another file, or replace it with --overwrite"):
        OutputFile(tmp_path / "thesis.json")
    file = OutputFile(tmp_path / "thesis.json", overwrite=True)
    assert (tmp_path / "thesis.json").read_text() == "precious"
    file.write({"a": 1})
    assert json.loads((tmp_path / "thesis.json").read_text()) == {"a": 1}


def test_places_that_cannot_be_written_are_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    cases = {
        tmp_path: "is there and no file",
        "/dev/null": "is there and no file",
        tmp_path / "file" / "scores.json": "(File exists|Not a directory)",
        tmp_path / ("x" * 300): "File name too long",
        "/proc/scores.json": "cannot be written",
    }
    for path, hint in cases.items():
        with pytest.raises(OutputError, match=hint):
            OutputFile(path, overwrite=True)
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "scores.json").write_text("old")
    with pytest.raises(TypeError):
        OutputFile(tmp_path / "scores.json", overwrite=True).write({"a": object()})
    assert (tmp_path / "scores.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["scores.json"]
