"""The Python of README.md runs as it stands, on a tiny teacher and student in the places that it names."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModel

import makd
from tests.models import batch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch, encoder_folder, tokenizer):
    """A working directory that has what the README speaks of."""
    teacher = tmp_path / "path" / "to" / "teacher"
    teacher.parent.mkdir(parents=True)
    teacher.symlink_to(encoder_folder)
    model = AutoModel.from_pretrained(encoder_folder)
    student = makd.factorize(model, makd.Budget(keep_linears=0.5), calibration=[batch(model)])
    student.save_pretrained(tmp_path / "runs" / "demo")
    tokenizer.save_pretrained(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_every_block_runs_in_a_process_of_its_own(code, place):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=place, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
