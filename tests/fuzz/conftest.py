"""What the fuzz tests share: the count of cases, and a tiny teacher and student with data to run on."""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest

from makd.cli.main import main
from tests.fuzz.oracle import Cases

os.environ["CUDA_VISIBLE_DEVICES"] = ""
STARTED = time.process_time()
LINES = "\n".join(f"line {number} is a line of text about the number {number}" for number in range(24))


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/fuzz/" in str(item.path):
            item.add_marker(pytest.mark.fuzz)


@dataclass(frozen=True)
class Workspace:
    """Where a case happens."""

    teacher: Path
    student: Path
    text: Path
    folder: Path
    """Of the case: may be written to."""
    output: Path

    def flags(self, teacher=None, text=None):
        """A short run of `makd factorize`, without words for what a case is about."""
        return [
            "--teacher", teacher or self.teacher, "--output", self.output, "--budget.keep_linears", 0.5,
            "--data.path", text or self.text, *SHORT,
        ]  # fmt: skip

    def evaluation(self, student):
        """A short `makd evaluate` of a student against the teacher; it makes no factors."""
        solver = SHORT.index("--recipe.factorize.solver")
        short = SHORT[:solver] + SHORT[solver + 2 :]
        return ["evaluate", student, "--teacher", self.teacher, "--data.path", self.text, *short]


SHORT = [
    "--data.max_length", 16, "--recipe.factorize.solver", "svd", "--recipe.evaluation.rows", 4,
    "--recipe.evaluation.latency", "false", "--recipe.device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="session")
def cases():
    return Cases()


@pytest.fixture(scope="session")
def seconds():
    """Of the processor since the suite began: those by the clock depend on what else runs."""
    return lambda: time.process_time() - STARTED


@pytest.fixture(scope="session")
def made_student(encoder_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(LINES)
    words = ["factorize", "--teacher", encoder_folder, "--output", folder / "student", "--budget.keep_linears", 0.5,
             "--data.path", folder / "text.txt", *SHORT]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    return folder / "student"


@pytest.fixture
def workspace(encoder_folder, made_student, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "text.txt").write_text(LINES)
    (tmp_path / "case").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield Workspace(encoder_folder, made_student, tmp_path / "text.txt", tmp_path / "case", tmp_path / "output")
    assert not list((tmp_path / "here").iterdir()), "something was written where the command was called"
    assert {path.name for path in tmp_path.iterdir()} <= {"text.txt", "case", "here", "cache", "output"}


@pytest.fixture
def copied(workspace):
    """Gives a fresh copy of a folder, for a case to damage."""

    def copy(folder):
        target = workspace.folder / "copy"
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(folder, target))

    return copy
