"""What reads a student's files: makd those of older formats too, bit for bit; transformers without makd none at all."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import makd
from tests.models import batch, tiny

WITHOUT_MAKD = """
import sys, transformers
for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(transformers, name).from_pretrained(folder)
    except Exception as error:
        print(type(error).__name__)
    else:
        print("loaded")
assert not any(name.startswith("makd") for name in sys.modules)
"""


def make_student(name, head="base", **settings):
    return makd.factorize(tiny(name, head), makd.Budget(keep_linears=0.5), solver="svd", **settings)


def drop_layers(folded):
    teacher = tiny("llama", "causal_lm", num_hidden_layers=4)
    student = makd.factorize(
        teacher, makd.Budget(keep_linears=0.4), solver="svd", depth=2, calibration=[batch(teacher)]
    )
    return makd.fold(student) if folded else student


STUDENTS = {
    "plain": lambda: make_student("bert"),
    "Conv1D": lambda: make_student("gpt2", "causal_lm"),
    "one A for several": lambda: make_student("t5", share_input="always"),
    "factored tied vocabulary": lambda: make_student("bert", "masked_lm", vocabulary="factored"),
    "factored head": lambda: make_student("llama", "causal_lm", vocabulary="factored"),
    "factored tied vocabulary of a decoder": lambda: make_student("gpt2", "causal_lm", vocabulary="factored"),
    "embeddings in bands": lambda: in_bands(),
    "dropped layers": lambda: drop_layers(folded=False),
    "nothing but dropped layers": lambda: drop_layers(folded=True),
    "a rank that is the width": lambda: full_rank(),
}


def in_bands():
    teacher = tiny("bert", vocab_size=640)
    return makd.factorize(teacher, makd.Budget(keep=0.3), vocabulary="factored", calibration=[batch(teacher)])


def full_rank():
    from makd.solvers.factors import Factors
    from makd.student.hub import mark_student
    from makd.student.linear import LowRankLinear

    student = tiny("bert")
    for name in makd.resolve(student).linears:
        weight = student.get_submodule(name).weight.detach()
        if weight.shape[0] == weight.shape[1]:  # A has the shape of the dense weight
            factors = Factors(torch.eye(len(weight)), weight, 0.0)
            student.set_submodule(name, LowRankLinear.from_factors(factors, student.get_submodule(name).bias).eval())
    mark_student(student)
    return student


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    students = {name: make() for name, make in STUDENTS.items()}
    for name, student in students.items():
        student.save_pretrained(root / name)
    return root, students


def test_transformers_without_makd_refuses_every_student(saved):
    root, students = saved
    words = [[type(student).__name__, str(root / name)] for name, student in students.items()]
    words += [
        ["T5EncoderModel", str(root / "one A for several")],
        ["BertModel", str(root / "factored tied vocabulary")],
    ]
    words += [["BertForSequenceClassification", str(root / "plain")]]
    arguments = [word for pair in words for word in pair]
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_MAKD, *arguments], capture_output=True, text=True, check=False,
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["RuntimeError"] * len(words)


@pytest.mark.parametrize("name", STUDENTS)
def test_makd_reads_it_bit_for_bit(name, saved):
    root, students = saved
    again = type(students[name]).from_pretrained(root / name)
    assert makd.fingerprint(again) == makd.fingerprint(students[name])


def to_format_3(folder, into):
    """The folder as makd wrote it before there were identities."""
    into.mkdir()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = 3
    del config["quantization_config"]["identity"]
    (into / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    old = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    assert len(old) < len(tensors)
    save_file(old, into / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", [name for name in STUDENTS if name != "embeddings in bands"])
def test_format_3_is_read_bit_for_bit_and_becomes_4_when_it_is_saved(name, saved, tmp_path, caplog):
    root, students = saved
    to_format_3(root / name, tmp_path / "old")
    again = type(students[name]).from_pretrained(tmp_path / "old")
    assert "MISSING" not in caplog.text
    assert makd.fingerprint(again) == makd.fingerprint(students[name])
    again.save_pretrained(tmp_path / "new")
    assert (
        load_file(tmp_path / "new" / "model.safetensors").keys() == load_file(root / name / "model.safetensors").keys()
    )
    assert json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]["format"] == 4
    assert makd.fingerprint(type(again).from_pretrained(tmp_path / "new")) == makd.fingerprint(students[name])


def test_the_same_student_has_the_same_bytes(saved, tmp_path):
    root, _ = saved
    make_student("bert").save_pretrained(tmp_path)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (root / "plain" / file).read_bytes()
