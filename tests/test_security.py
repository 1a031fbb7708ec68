"""SECURITY.md: every claim names a test that exists; and those claims that no other test shows."""

import ast
import json
import re
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from makd.errors import ModelLoadError
from makd.loading import load_model, load_tokenizer

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))


def functions(path):
    """Names of all tests in a file, as pytest calls them."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}::{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef))


def test_there_are_claims():
    assert len(NAMED) >= 10


@pytest.mark.parametrize(("path", "name"), NAMED, ids=[name for _, name in NAMED])
def test_every_test_that_a_claim_names_exists(path, name):
    assert name in functions(ROOT / path)


class Planted:
    """Pickled, it touches a file where it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_nobody_is_asked_whether_to_run_code(monkeypatch, encoder_folder, tmp_path):
    """transformers would ask at a terminal; here somebody would say yes."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    planted, folder = tmp_path / "planted", tmp_path / "teacher"
    shutil.copytree(encoder_folder, folder)
    (folder / "own.py").write_text(f"open({str(planted)!r}, 'w')")
    own = {"AutoConfig": "own.Own", "AutoModel": "own.Own", "AutoTokenizer": ["own.Own", "own.Own"]}
    for name in ("tokenizer_config.json", "config.json"):
        content = json.loads((folder / name).read_text())
        changed = {"auto_map": own, "model_type": "nobody_knows", "tokenizer_class": "NobodyKnows"}
        (folder / name).write_text(json.dumps(content | changed))
        for load in (load_tokenizer, load_model):
            with suppress(ModelLoadError):
                load(str(folder))
    assert asked == []
    assert not planted.exists()


def test_neither_a_pickles_code_nor_remote_code_is_run(run, encoder_folder, tmp_path):
    """A pickle with code in it beside or instead of the weights; a config that names code of its own."""
    planted, folder = tmp_path / "planted", tmp_path / "teacher"
    shutil.copytree(encoder_folder, folder)
    torch.save({**load_file(folder / "model.safetensors"), "code": Planted(planted)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    code, _, err = run("inspect", folder)
    assert code == 2
    assert "No model could be loaded" in err
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "bert"', '"model_type": "nobody_knows"'))
    text = config.read_text()
    config.write_text(text.replace("{", '{"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"},', 1))
    (folder / "own.py").write_text(f"open({str(planted)!r}, 'w')")
    assert run("inspect", folder)[0] == 2
    assert not planted.exists()
