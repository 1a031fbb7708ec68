"""Files that are whole at any moment."""

import ast
import json
import os
import re
from pathlib import Path

import pytest

import makd
from makd.whole_files import file_digest, sync_file, write_json_whole, write_whole


def test_a_reader_finds_the_old_content_until_the_new_is_on_disk(tmp_path, monkeypatch):
    file, seen = tmp_path / "a.json", []
    write_json_whole(file, {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda number: seen.append(json.loads(file.read_text())))
    write_json_whole(file, {"a": 2})
    assert (seen, json.loads(file.read_text())) == ([{"a": 1}], {"a": 2})


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    def full(number):
        raise OSError("no space")

    file = tmp_path / "a.txt"
    write_whole(file, "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(file, "new")
    assert file.read_text() == "old"


def test_nothing_else_is_left_in_the_folder(tmp_path):
    write_whole(tmp_path / "a.txt", "ä")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == "ä".encode()


def test_a_digest_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_no_other_module_dumps_json_into_an_open_file():
    dumping = [
        str(path)
        for path in Path(makd.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "dump" and ast.unparse(node.value) == "json"
    ]
    assert not dumping


@pytest.mark.parametrize(("system", "mode"), [("nt", os.O_RDWR), ("posix", os.O_RDONLY)])
def test_a_file_is_synced_by_a_handle_that_the_system_takes(system, mode, tmp_path, monkeypatch):
    fcntl, modes = pytest.importorskip("fcntl"), []
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(os, "fsync", lambda number: modes.append(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE))
    monkeypatch.setattr("makd.whole_files.SYSTEM", system)
    sync_file(tmp_path / "a.txt")
    assert modes == [mode]


def test_nothing_else_syncs_a_file_that_it_opened_for_reading():
    sources = Path(makd.__file__).parent.rglob("*.py")
    pattern = r'open\("rb"\)[^\n]*\n\s*os\.fsync'
    assert [path.name for path in sources if re.search(pattern, path.read_text("utf-8"))] == []
