"""Exports are opened by pipelines where makd is not installed, and say what the student says.

`MAKD_ELSEWHERE` names the Python of an environment with optimum-onnx, transformers and torch, and without makd.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import pipeline

import makd
from makd import exporting
from makd.export import ExportConfig
from makd.loading import load_model
from tests.models import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "MAKD_ELSEWHERE" not in os.environ,
        reason="MAKD_ELSEWHERE is not set; its environment: pip install torch optimum-onnx[onnxruntime]",
    ),
]
TEXT = "names of the class [MASK] in a module"
HEADS = {
    "feature-extraction": "base",
    "fill-mask": "masked_lm",
    "text-classification": "sequence_classification",
    "token-classification": "token_classification",
    "text-generation": "causal_lm",
}


def numbers(found):
    """All numbers of what a pipeline said, in order, and its words."""
    if isinstance(found, dict):
        return [number for key in sorted(found) for number in numbers(found[key])]
    if isinstance(found, list):
        return [number for part in found for number in numbers(part)]
    return ["".join(found.split())] if isinstance(found, str) else [float(found)]  # spaces between words went and came


@pytest.mark.parametrize("runtime", ["onnx", "transformers"])
@pytest.mark.parametrize("task", HEADS)
def test_a_pipeline_says_elsewhere_what_it_says_of_the_student(task, runtime, tokenizer, tmp_path):
    name = "llama" if task == "text-generation" else "bert"
    student = makd.factorize(
        tiny(name, HEADS[task], vocab_size=len(tokenizer)), makd.Budget(keep_linears=0.5), solver="svd"
    )
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    settings = ExportConfig(to="onnx" if runtime == "onnx" else "dense")
    exporting.export(str(tmp_path / "student"), settings, tmp_path / "export")
    script, output = Path(__file__).with_name("elsewhere.py"), tmp_path / "said.json"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    subprocess.run(
        [os.environ["MAKD_ELSEWHERE"], str(script), runtime, task, str(tmp_path / "export"), TEXT, str(output)],
        check=True, env=environment, timeout=300,
    )  # fmt: skip
    own = pipeline(task, model=load_model(str(tmp_path / "student"), HEADS[task]), tokenizer=tokenizer, device="cpu")
    more = {"max_new_tokens": 5, "do_sample": False} if task == "text-generation" else {}
    with torch.no_grad():
        expected = numbers(own(TEXT, **more))
    found = numbers(json.loads(output.read_text()))
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == (pytest.approx(theirs, abs=1e-4) if isinstance(theirs, float) else theirs)
