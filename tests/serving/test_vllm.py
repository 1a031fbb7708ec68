"""vLLM's own engine, on a CPU, makes of a student's folder what the student makes: real models, loaders and processes.

It needs vLLM with its CPU kernels, in an environment of its own (docs/how-to/serve-with-vllm.md). The engines of a
class of tests are started in one process of their own, where vLLM finds makd by the entry point.
"""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, GPT2Config

import makd
from makd.errors import ModelLoadError, UnsupportedModelError
from tests.models import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of vLLM's imports
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; docs/how-to/serve-with-vllm.md says how, in an environment of its own",
    ),
]
SERVED = Path(__file__).with_name("served.py")
PROMPTS = [[5, 17, 33, 41, 9, 50], [7, 8, 21]]
SIZES = {
    "bert": {"hidden_size": 128},
    "falcon": {"hidden_size": 128, "ffn_hidden_size": 512},
    "gpt_neox": {"hidden_size": 128},
    "phi3": {"hidden_size": 128},
}
"""vLLM's attention on a CPU wants heads of at least 32."""


def make(name, head="causal_lm", **settings):
    sizes = SIZES.get(name, {"hidden_size": 128, "head_dim": 32})
    return makd.factorize(tiny(name, head, **sizes), makd.Budget(keep_linears=0.6), solver="svd", **settings).eval()


def serve(folder, jobs):
    """What vLLM made of the folders, or how it failed: name -> (folder, task, settings) -> name -> result."""
    settings = {"dtype": "float32", "enforce_eager": True}
    jobs = {
        name: (str(path), task, settings | {"skip_tokenizer_init": task == "generate"} | own)
        for name, (path, task, own) in jobs.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    command = [sys.executable, str(SERVED), str(folder / "jobs.json"), str(folder / "made.json")]
    with (folder / "log").open("w") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=log)
    assert done.returncode == 0, (folder / "log").read_text()
    return json.loads((folder / "made.json").read_text())


def distance(student, result):
    """The largest difference of a log-probability from the student's own."""
    assert "made" in result, result
    largest = 0.0
    for prompt, row in zip(PROMPTS, result["made"], strict=True):
        with torch.no_grad():
            scores = student(torch.tensor([prompt + row["ids"]])).logits[0].float().log_softmax(-1)
        for place, likeliest in enumerate(row["logprobs"]):
            expected = scores[len(prompt) - 1 + place]
            largest = max(largest, *(abs(value - float(expected[int(token)])) for token, value in likeliest.items()))
    return largest


def with_dense_parts():
    return makd.fold(
        make("llama", share_input="never"), ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"]
    )


STUDENTS = {
    "own ranks": lambda: make("llama", share_input="never"),
    "a shared A, and biases": lambda: make("qwen2", share_input="always"),
    "norms of heads": lambda: make("qwen3", share_input="auto"),
    "dense parts": with_dense_parts,
    "merged in the files, too": lambda: make("phi3", share_input="never"),
    "heads whose rows vLLM reorders": lambda: make("falcon"),
    "heads whose rows vLLM reorders, and biases": lambda: make("gpt_neox"),
    "bfloat16": lambda: make("llama", share_input="never").bfloat16(),
}
RUNS = {
    "own ranks": {}, "own ranks, 2 processes": {"tensor_parallel_size": 2},
    "a shared A, and biases": {}, "a shared A, and biases, 2 processes": {"tensor_parallel_size": 2},
    "a shared A, and biases, compiled": {"enforce_eager": False},
    "norms of heads": {},
    "dense parts, 2 processes": {"tensor_parallel_size": 2},
    "merged in the files, too, 2 processes": {"tensor_parallel_size": 2},
    "heads whose rows vLLM reorders": {},
    "heads whose rows vLLM reorders, and biases, 2 processes": {"tensor_parallel_size": 2},
    "bfloat16": {"dtype": "bfloat16"},
}  # fmt: skip


def student_of(run):
    return run.removesuffix(", 2 processes").removesuffix(", compiled")


@pytest.fixture(scope="module")
def students():
    return {name: build() for name, build in STUDENTS.items()}


@pytest.fixture(scope="module")
def decoders_served(students, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")
    for name, student in students.items():
        student.save_pretrained(folder / name)
    return serve(folder, {run: (folder / student_of(run), "generate", own) for run, own in RUNS.items()})


class TestDecoders:
    @pytest.mark.parametrize("run", [run for run in RUNS if run != "bfloat16"])
    def test_write_with_the_students_probabilities(self, run, students, decoders_served):
        assert distance(students[student_of(run)], decoders_served[run]) < 1e-4
        assert decoders_served[run]["processes"] == RUNS[run].get("tensor_parallel_size", 1)

    def test_in_bfloat16_are_as_near_to_float32_as_the_student_in_bfloat16(self, students, decoders_served):
        student, result = students["bfloat16"], decoders_served["bfloat16"]
        exact = copy.deepcopy(student).float()
        rounding = 0.0
        for prompt, row in zip(PROMPTS, result["made"], strict=True):
            ids = torch.tensor([prompt + row["ids"]])
            with torch.no_grad():
                rounded, expected = (model(ids).logits.float().log_softmax(-1) for model in (student, exact))
            rounding = max(rounding, float((rounded - expected).abs().max()))
        assert distance(exact, result) < 2 * rounding < 0.5


@pytest.fixture(scope="module")
def student():
    return make("bert", "base")


@pytest.fixture(scope="module")
def encoders_served(student, tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("encoders")
    student.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    settings = {"runner": "pooling", "pooler_config": {"seq_pooling_type": "CLS", "use_activation": False}}
    return serve(
        folder,
        {n: (folder / "bert", "embed", settings | {"tensor_parallel_size": int(n)}) for n in ("1", "2")},
    )


class TestEncoders:
    @pytest.mark.parametrize("processes", ["1", "2"])
    def test_embed_as_the_student_does(self, processes, student, encoders_served):
        with torch.no_grad():
            expected = torch.stack([student(torch.tensor([ids])).last_hidden_state[0, 0] for ids in PROMPTS])
        torch.testing.assert_close(torch.tensor(encoders_served[processes]["made"]), expected, rtol=0, atol=1e-4)


def without(name):
    return lambda tensors: tensors.pop(name)


def of_another_student(name):
    return lambda tensors: tensors[name].add_(1)


def with_a_rank_less(name, axis):
    def edit(tensors):
        tensors[name] = tensors[name].narrow(axis, 0, tensors[name].shape[axis] - 1).clone()

    return edit


LLAMA = "model.layers.1."
FAULTS = {
    "no A": ("llama", without(LLAMA + "self_attn.k_proj.reduce.weight"), {},
             "The weight files lack 'reduce' of 'model.layers.1.self_attn.k_proj'"),
    "no A of a split input": ("llama", without(LLAMA + "mlp.down_proj.reduce.weight"), {},
                              "The weight files lack 'reduce' of 'model.layers.1.mlp.down_proj'"),
    "no B": ("llama", without(LLAMA + "self_attn.v_proj.expand.weight"), {},
             "The weight files lack 'expand' of 'model.layers.1.self_attn.v_proj'"),
    "no identity": ("llama", without(LLAMA + "self_attn.q_proj.weight"), {},
                    "The weight files lack 'weight' of 'model.layers.1.self_attn.q_proj'"),
    "no bias": ("qwen2", without("model.layers.0.self_attn.k_proj.expand.bias"), {},
                "The weight files lack 'bias' of 'model.layers.0.self_attn.k_proj'"),
    "another identity": ("llama", of_another_student(LLAMA + "mlp.up_proj.weight"), {},
                         "The weights of 'model.layers.1.mlp.up_proj' are of student"),
    "another rank of A": ("llama", with_a_rank_less(LLAMA + "self_attn.v_proj.reduce.weight", 0), {},
                          "model.layers.1.self_attn.v_proj.reduce has rank"),
    "another rank of B": ("llama", with_a_rank_less(LLAMA + "self_attn.v_proj.expand.weight", 1), {},
                          "model.layers.1.self_attn.v_proj.expand has rank"),
    "adapters": ("llama", lambda tensors: None, {"enable_lora": True}, "vLLM puts LoRA adapters on dense linears"),
}  # fmt: skip


@pytest.fixture(scope="module")
def faults_served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    students = {name: make(name, share_input="never") for name in ("llama", "qwen2")}
    for fault, (name, edit, _, _) in FAULTS.items():
        students[name].save_pretrained(folder / fault)
        tensors = load_file(folder / fault / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / fault / "model.safetensors", {"format": "pt"})
    return serve(folder, {fault: (folder / fault, "generate", own) for fault, (_, _, own, _) in FAULTS.items()})


class TestFaults:
    """Of files: an error before anything is served."""

    @pytest.mark.parametrize("fault", FAULTS)
    def test_are_told_before_anything_is_served(self, fault, faults_served):
        assert FAULTS[fault][-1] in faults_served[fault].get("error", ""), faults_served[fault]


class TestRefused:
    """Of a config: an error with the way out, before weights are read."""

    def served(self, **changes):
        from makd.serving.vllm_config import ServedStudent

        config = {
            "ranks": {"lm_head": 3}, "parameters": {"total": 1, "factored": 1, "vocabulary": 1},
            "architecture": "LlamaForCausalLM", "identity": "0" * 16, "format": 4, "quant_method": "makd",
        }  # fmt: skip
        return ServedStudent.from_config(config | changes)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"embeddings": {"model.embed_tokens": 3}}, "token embeddings are factored"),
            ({"experts": {"mlp.experts.up": {"rank": 3, "shared": ""}}, "format": 5}, "routed experts are factored"),
            ({"dropped": {"model.layers.1": 0}}, "layers were dropped"),
        ],
        ids=["embeddings", "experts", "layers"],
    )
    def test_what_vllm_does_not_run(self, changes, said):
        with pytest.raises(UnsupportedModelError, match=f"{said}.*makd export"):
            self.served(**changes)

    def test_an_old_format(self):
        with pytest.raises(ModelLoadError, match="format 3; vLLM needs format 4"):
            self.served(format=3)

    @pytest.mark.parametrize("config", [GPT2Config(), BloomConfig()], ids=["gpt2", "bloom"])
    def test_a_model_that_vllm_rearranges(self, config):
        with pytest.raises(UnsupportedModelError, match=f"rearranges the matrices of a {config.model_type}"):
            self.served().maybe_update_config("student", config)

    def test_factors_that_have_no_place(self):
        with pytest.raises(UnsupportedModelError, match="'lm_head' and 0 others have no linear"):
            self.served().check_found()
