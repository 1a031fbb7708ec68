"""A saved student in lm-evaluation-harness, through the harness's own `hf` model."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

import makd

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "evaluate-a-decoder.md"
TEXTS = ["A list is a mutable sequence of items.", "Its methods are append and pop."]
TASKS = {
    "tiny_text": """
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "tiny_choice": """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["Yes.", "No."]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks of a few rows."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, content in TASKS.items():
        (folder / f"{name}.yaml").write_text(content.replace("FILE", str(rows)))
    return folder


@pytest.fixture
def student(tmp_path, decoder_folder):
    """A folder with a student and a tokenizer that puts nothing around a text."""
    folder = tmp_path / "student"
    teacher = AutoModelForCausalLM.from_pretrained(decoder_folder)
    makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(decoder_folder)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.bos_token = "[CLS]"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # the harness hands on what the config says
def test_a_student_is_evaluated_as_any_model(student, tasks):
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(student)}, tasks=["tiny_text", "tiny_choice"], device="cpu",
        batch_size=2, task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    ours = [makd.rolling_perplexity(model, tokenizer, text) for text in TEXTS]
    expected = 2.718281828459045 ** (sum(one.nats for one in ours) / sum(one.words for one in ours))
    assert found["results"]["tiny_text"]["word_perplexity,none"] == pytest.approx(expected, rel=1e-4)
    assert 0 <= found["results"]["tiny_choice"]["acc,none"] <= 1


@pytest.mark.slow
def test_the_command_of_the_how_to_runs(student, tasks, installed):
    command = re.search(r"^(lm_eval .*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    places = {"--tasks": "tiny_text,tiny_choice", "--model_args": f"pretrained={student}"}
    words = [places.get(before, word) for before, word in zip(["", *command], command, strict=False)]
    paths = os.pathsep.join((str(installed), str(Path(makd.__file__).parents[1])))
    done = subprocess.run(
        [Path(sys.executable).with_name(words[0]), *words[1:], "--include_path", tasks, "--device", "cpu"],
        capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "word_perplexity" in done.stdout
