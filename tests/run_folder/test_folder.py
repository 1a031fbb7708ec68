"""A result appears whole or not at all, replaces nothing unasked, and only what makd wrote."""

import errno
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import makd
from makd.distill.resuming.checkpoints import list_files as say_whole
from makd.errors import OutputError, SettingError
from makd.run_folder import OutputFolder

OLD_STUDENT = (
    "recipe.yaml", "environment.json", "metrics.json", "config.json", "model.safetensors", "README.md",
    "tokenizer.json", "tokenizer_config.json", "1_Pooling/config.json", "modules.json", "vocab.txt",
)  # fmt: skip


def fail_halfway(folder, file, error=None):
    """Work that stops with an error after it has written something."""
    with folder, folder.work() as result:
        file = result / file if isinstance(file, str) else file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
        raise error or RuntimeError("boom")


def make(path, content="new", **settings):
    """A result with one file."""
    with OutputFolder(path, **settings) as folder, folder.work() as result:
        (result / "a").write_text(content)
    return folder


def keep_checkpoint(path, step=5):
    """What a run leaves that was stopped after its checkpoint."""
    folder = OutputFolder(path)
    with suppress(KeyboardInterrupt), folder, folder.work():
        place = folder.checkpoints / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "model.safetensors").write_text("weights")
        say_whole(place)
        raise KeyboardInterrupt
    return folder


def names(path):
    return sorted(each.name for each in path.iterdir())


def test_the_folder_appears_when_the_work_is_done(tmp_path):
    folder = OutputFolder(tmp_path / "runs" / "student")
    with folder, folder.work() as result:
        (result / "a").write_text("new")
        assert not folder.path.exists()
    assert (folder.path / "a").read_text() == "new"
    assert names(tmp_path / "runs") == ["student"]


def test_the_folder_says_what_makd_wrote(tmp_path):
    make(tmp_path / "student")
    assert json.loads((tmp_path / "student" / "makd.json").read_text())["files"] == ["a"]


def test_a_folder_that_is_not_empty_is_refused_before_any_work(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "old").write_text("precious")
    with pytest.raises(OutputError, match="not empty"):
        OutputFolder(tmp_path / "student").__enter__()
    assert names(tmp_path) == ["student"]


def test_an_empty_folder_is_fine(tmp_path):
    (tmp_path / "student").mkdir()
    make(tmp_path / "student")
    assert (tmp_path / "student" / "a").exists()


def test_overwriting_replaces_only_at_the_end(tmp_path):
    target = tmp_path / "student"
    make(target, "old")
    with OutputFolder(target, overwrite=True) as folder, folder.work() as result:
        (result / "b").write_text("new")
        assert (target / "a").read_text() == "old"
    assert names(target) == ["b", "makd.json"]
    assert names(tmp_path) == ["student"]


def test_an_error_leaves_what_was_there(tmp_path):
    target = tmp_path / "student"
    make(target, "old")
    with pytest.raises(RuntimeError, match="boom"):
        fail_halfway(OutputFolder(target, overwrite=True), "a")
    assert (target / "a").read_text() == "old"
    assert names(tmp_path) == ["student"]


@pytest.mark.parametrize("name", ["student.old", "student.partial", "student.makd", ".student"])
def test_folders_of_a_users_own_beside_the_output_stay(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("precious")
    make(tmp_path / "student")
    make(tmp_path / "student", overwrite=True)
    assert (tmp_path / name / "thesis.txt").read_text() == "precious"
    assert names(tmp_path) == sorted([name, "student"])


def test_a_folder_of_the_hidden_name_that_makd_did_not_make_is_named_and_left_alone(tmp_path):
    (tmp_path / ".student.makd").mkdir()
    (tmp_path / ".student.makd" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match=r"\.student\.makd is in the way"):
        make(tmp_path / "student", overwrite=True)
    assert names(tmp_path / ".student.makd") == ["thesis.txt"]


# two runs


def test_a_second_run_into_the_same_output_is_refused_at_once(tmp_path):
    with OutputFolder(tmp_path / "student") as one, one.work() as result:
        with pytest.raises(OutputError, match=rf"Another run \(process {os.getpid()} on .+ is making"):
            OutputFolder(tmp_path / "student", overwrite=True).__enter__()
        (result / "a").write_text("one")
    assert (tmp_path / "student" / "a").read_text() == "one"


HOLDS = """
import sys, time
from contextlib import suppress
from pathlib import Path
from makd.run_folder.workplace import Workplace
place = Workplace(Path(sys.argv[1]))
place.enter()
print("in", flush=True)
time.sleep(600)
"""


def test_a_process_that_is_dead_is_no_obstacle(tmp_path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "student")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "in\n"
            with pytest.raises(OutputError, match=f"process {other.pid}"):
                make(tmp_path / "student")
        finally:
            other.send_signal(signal.SIGKILL)
    make(tmp_path / "student")
    assert names(tmp_path) == ["student"]


# overwriting


def test_what_makd_did_not_write_is_not_replaced(tmp_path):
    make(tmp_path / "student", "old")
    (tmp_path / "student" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match=r"holds more than an output of makd: thesis.txt"):
        make(tmp_path / "student", overwrite=True)
    assert (tmp_path / "student" / "a").read_text() == "old"


def test_what_came_into_the_output_during_the_work_is_not_replaced(tmp_path):
    make(tmp_path / "student", "old")

    def work():
        with OutputFolder(tmp_path / "student", overwrite=True) as folder, folder.work() as result:
            (result / "a").write_text("new")
            (tmp_path / "student" / "thesis.txt").write_text("precious")

    with pytest.raises(OutputError, match="is finished and stands in") as caught:
        work()
    made = tmp_path / ".student.makd" / "result"
    assert (tmp_path / "student" / "thesis.txt").read_text() == "precious"
    assert (made / "a").read_text() == "new"
    assert str(made) in str(caught.value)


@pytest.mark.parametrize("more", [None, "thesis.txt", "1_Pooling/thesis.pdf"])
def test_a_folder_of_an_older_makd_is_known_by_its_files(tmp_path, more):
    for name in (*OLD_STUDENT, *([] if more is None else [more])):
        (tmp_path / "student" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "student" / name).write_text("{}")
    if more is None:
        make(tmp_path / "student", overwrite=True)
        assert names(tmp_path / "student") == ["a", "makd.json"]
    else:
        with pytest.raises(OutputError, match=more):
            make(tmp_path / "student", overwrite=True)


@pytest.mark.parametrize(
    ("output", "read"), [("teacher", "teacher"), ("all", "all/teacher"), ("teacher/student", "teacher")]
)
def test_what_a_run_reads_is_not_replaced(tmp_path, output, read):
    make(tmp_path / output)
    if not (tmp_path / read).exists():  # a result that holds another
        with OutputFolder(tmp_path / output, overwrite=True) as folder, folder.work() as result:
            (result / "teacher").mkdir()
            (result / "teacher" / "a").write_text("weights")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="which this run reads"):
        make(tmp_path / output, overwrite=True, inputs=[str(tmp_path / read), "org/model", None])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_that_is_empty_is_that_of_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        make(Path("runs/student"), overwrite=True, inputs=[""])


@pytest.mark.parametrize("output", [".", ".."])
def test_the_folder_that_makd_runs_in_is_refused(tmp_path, monkeypatch, output):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="the folder that makd runs in"):
        make(Path(output), overwrite=True)


@pytest.mark.parametrize("switch", ["overwrite", "resume"])
@pytest.mark.parametrize("value", ["false", "no", 1, None])
def test_a_switch_is_true_or_false(tmp_path, switch, value):
    with pytest.raises(SettingError, match=f"{switch} is true or false; got {value!r}"):
        OutputFolder(tmp_path / "student", **{switch: value})


# checkpoints


def test_checkpoints_survive_a_stop_and_a_resumed_run_finds_them(tmp_path):
    keep_checkpoint(tmp_path / "student")
    with OutputFolder(tmp_path / "student", resume=True) as again, again.work():
        assert (again.checkpoints / "checkpoint-5").is_dir()
    assert names(tmp_path) == ["student"]


def test_a_stopped_run_says_what_stays(tmp_path, caplog):
    keep_checkpoint(tmp_path / "student")
    assert f"Checkpoints up to step 5 stay in {tmp_path / '.student.makd' / 'checkpoints'}" in caplog.text
    assert "--resume goes on" in caplog.text


def test_a_forgotten_resume_is_refused_and_loses_nothing(tmp_path):
    folder = keep_checkpoint(tmp_path / "student")
    with pytest.raises(OutputError, match=r"up to step 5\. Go on with it by --resume, start anew with --overwrite"):
        make(tmp_path / "student")
    assert (folder.checkpoints / "checkpoint-5" / "model.safetensors").is_file()


def test_overwrite_starts_without_old_checkpoints_and_says_so(tmp_path, caplog):
    keep_checkpoint(tmp_path / "student")
    with OutputFolder(tmp_path / "student", overwrite=True) as folder:
        assert folder.checkpoints.is_dir()  # nothing goes before the work begins
        with folder.work():
            assert not folder.checkpoints.exists()
    assert "up to step 5, are removed, as --overwrite says" in caplog.text


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(OutputError, match=r"nothing to resume .* no checkpoints"):
        make(tmp_path / "student", resume=True)
    assert names(tmp_path) == []


def test_a_run_without_a_whole_checkpoint_leaves_nothing(tmp_path):
    folder = OutputFolder(tmp_path / "student")
    with pytest.raises(RuntimeError, match="boom"):
        fail_halfway(folder, folder.checkpoints / "checkpoint-5" / "model.safetensors")
    assert names(tmp_path) == []


def test_checkpoints_that_are_all_damaged_are_named(tmp_path):
    folder = keep_checkpoint(tmp_path / "student")
    (folder.checkpoints / "checkpoint-5" / "model.safetensors").write_text("wei")
    with pytest.raises(OutputError, match=r"no checkpoint there is whole .*model.safetensors is damaged"):
        make(tmp_path / "student", resume=True)


@pytest.mark.parametrize("kind", ["cache", "factorization"])
def test_unfinished_work_of_another_command_is_refused(tmp_path, kind):
    folder = OutputFolder(tmp_path / "student", kinds=[kind])
    part = tmp_path / ".student.makd" / kind / "part"
    with pytest.raises(RuntimeError, match="boom"):
        fail_halfway(folder, part)
    with pytest.raises(OutputError, match=f"the unfinished work of another command: {kind}"):
        make(tmp_path / "student")
    with OutputFolder(tmp_path / "student", kinds=[kind]) as again, again.work():
        assert part.read_text() == "half"


def test_a_factorization_without_a_checkpoint_is_gone_on_with_and_the_training_begins_in_every_process(
    tmp_path, monkeypatch
):
    with OutputFolder(tmp_path / "student", kinds=["checkpoints", "factorization"]) as folder:
        folder.factorization.mkdir()
        (folder.factorization / "work.json").write_text("{}")
    with OutputFolder(tmp_path / "student", resume=True, kinds=["checkpoints", "factorization"]) as first:
        assert not first.resume
    monkeypatch.setattr("makd.run_folder.folder.from_first", lambda _: first.resume)  # what another process is told
    with OutputFolder(tmp_path / "student", resume=True, kinds=["checkpoints", "factorization"]) as other:
        assert not other.resume


# places that cannot be written to


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "student").write_text("a file")
    with pytest.raises(OutputError, match="is a file"):
        make(tmp_path / "student")


def test_places_that_cannot_be_made_are_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    cases = {
        tmp_path / "file" / "student": "Not a directory",
        tmp_path / "link": "is a link to .*nowhere, which is not there",
        tmp_path / ("x" * 300): "File name too long",
        tmp_path / ("x" * 252): "File name too long",
        Path("/proc/student"): "cannot be written",
        Path("/proc"): "where a disk is mounted",
        Path("/"): "where a disk is mounted",
    }
    for path, hint in cases.items():
        with pytest.raises(OutputError, match=hint):
            OutputFolder(path, overwrite=True).__enter__()
    assert names(tmp_path) == ["file", "link"]


def test_a_rename_that_will_fail_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rename", _fails(errno.EXDEV))
    with pytest.raises(OutputError, match="Invalid cross-device link"):
        OutputFolder(tmp_path / "student").__enter__()


def test_an_output_that_cannot_be_moved_away_is_told_before_the_work(tmp_path, monkeypatch):
    make(tmp_path / "student", "old")
    rename = Path.rename

    def busy(self, target):
        if self == tmp_path / "student":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    with pytest.raises(OutputError, match="Device or resource busy"):
        OutputFolder(tmp_path / "student", overwrite=True).__enter__()
    assert (tmp_path / "student" / "a").read_text() == "old"
    assert names(tmp_path) == ["student"]


def test_a_full_disk_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", _fails(errno.ENOSPC))
    with pytest.raises(OutputError, match="No space left"):
        OutputFolder(tmp_path / "student").__enter__()


def test_a_disk_without_room_for_the_result_is_told_before_the_work(tmp_path):
    with OutputFolder(tmp_path / "student") as folder:
        folder.check_room(1000)
        with pytest.raises(OutputError, match=r"needs about 1,000,000,000,000 MB, and its disk has [\d,]+ MB free"):
            folder.check_room(10**18)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("(os error 28)")])
def test_a_disk_that_fills_up_on_the_way_is_no_traceback(tmp_path, error):
    make(tmp_path / "student", "old")
    with pytest.raises(OutputError, match="Make room"):
        fail_halfway(OutputFolder(tmp_path / "student", overwrite=True), "a", error)
    assert (tmp_path / "student" / "a").read_text() == "old"
    assert names(tmp_path) == ["student"]


def test_a_result_that_cannot_be_put_in_its_place_stays_and_is_found(tmp_path, monkeypatch):
    make(tmp_path / "student", "old")
    rename = Path.rename

    def no_result(self, target):
        if self.name == "result":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", no_result)
        with pytest.raises(OutputError, match="The result is finished and stands in") as caught:
            make(tmp_path / "student", "new", overwrite=True)
    found = tmp_path / ".student.makd" / "result"
    assert str(found) in str(caught.value)
    assert (found / "a").read_text() == "new"
    assert (tmp_path / "student" / "a").read_text() == "old"
    (tmp_path / "student").rename(tmp_path / "away")
    with pytest.raises(OutputError, match=f"{found} is the finished result of an earlier run"):
        make(tmp_path / "student")
    assert (found / "a").read_text() == "new"


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    make(tmp_path / "student", "old")
    folder = OutputFolder(tmp_path / "student", overwrite=True)
    folder.__enter__()
    (tmp_path / "student").rename(tmp_path / ".student.makd" / "replaced")  # and here the process is gone
    folder._place._lock.release()
    with pytest.raises(makd.MakdError, match="not empty"):
        make(tmp_path / "student")
    assert (tmp_path / "student" / "a").read_text() == "old"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "student").symlink_to(tmp_path / "disk")
    make(tmp_path / "student")
    make(tmp_path / "student", "newer", overwrite=True)
    assert (tmp_path / "student").is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "newer"


def _fails(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail
