"""A result appears whole or not at all, and replaces nothing unasked."""

import pytest

import makd
from makd.report import OutputFolder


def fail_halfway(folder, file):
    """Work that stops with an error after it has written something."""
    with folder.work() as result:
        file = result / file if isinstance(file, str) else file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
        raise RuntimeError("boom")


def test_the_folder_appears_when_the_work_is_done(tmp_path):
    folder = OutputFolder(tmp_path / "runs" / "student")
    with folder.work() as result:
        (result / "a").write_text("new")
        assert not folder.path.exists()
    assert (folder.path / "a").read_text() == "new"
    assert not folder.partial.exists()


def test_a_folder_that_is_not_empty_is_refused_before_any_work(tmp_path):
    (tmp_path / "old").write_text("precious")
    with pytest.raises(makd.MakdError, match="not empty"):
        OutputFolder(tmp_path)


def test_an_empty_folder_is_fine(tmp_path):
    with OutputFolder(tmp_path).work() as result:
        (result / "a").write_text("new")
    assert (tmp_path / "a").exists()


def test_overwriting_replaces_only_at_the_end(tmp_path):
    target = tmp_path / "student"
    target.mkdir()
    (target / "old").write_text("precious")
    with OutputFolder(target, overwrite=True).work() as result:
        (result / "a").write_text("new")
        assert (target / "old").read_text() == "precious"
    assert sorted(path.name for path in target.iterdir()) == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]


def test_an_error_leaves_what_was_there(tmp_path):
    target = tmp_path / "student"
    target.mkdir()
    (target / "old").write_text("precious")
    with pytest.raises(RuntimeError, match="boom"):
        fail_halfway(OutputFolder(target, overwrite=True), "a")
    assert (target / "old").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student"]


def test_checkpoints_survive_an_error_and_a_resumed_run_finds_them(tmp_path):
    folder = OutputFolder(tmp_path / "student")
    with pytest.raises(RuntimeError, match="boom"):
        fail_halfway(folder, folder.checkpoints / "checkpoint-5" / "state")
    again = OutputFolder(tmp_path / "student", resume=True)
    with again.work():
        assert (again.checkpoints / "checkpoint-5").is_dir()
    assert not again.partial.exists()


def test_a_run_that_does_not_resume_starts_without_old_checkpoints(tmp_path):
    folder = OutputFolder(tmp_path / "student")
    (folder.checkpoints / "checkpoint-5").mkdir(parents=True)
    with folder.work():
        assert not folder.checkpoints.exists()


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(makd.MakdError, match="nothing to resume"):
        OutputFolder(tmp_path / "student", resume=True)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "student").write_text("a file")
    with pytest.raises(makd.MakdError, match="is a file"):
        OutputFolder(tmp_path / "student")
