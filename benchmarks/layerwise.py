"""Layers taught one by one, beside distillation of the whole model, at equal processor time.

    python benchmarks/layerwise.py run minilm --keeps 0.5 0.3 --seconds 240
    python benchmarks/layerwise.py run smollm2 --keeps 0.6 --seconds 600 --hidden
    python benchmarks/layerwise.py table

Every cell begins with the same student of `makd.factorize`, calibrated on the texts of benchmarks/factorization.py, and
learns from the same training text for about the same processor time, on one thread: `whole` by `DistillTrainer` with
the recipe's plan (src/makd/recipes), `layers` by `teach_layers_`, `both` half of the time by layers and the other half
whole. How many steps that makes is found by timing a few steps first; processor seconds that a cell really took are in
its line. Fidelity and perplexity are of unseen text: documentation (the training text's kind) and news for the encoder,
encyclopedia and instructions for the decoder. A seed is that of the order of the batches.

`run` appends one JSON line a cell to benchmarks/results/layerwise.jsonl and skips those that are there; `table` writes
docs/results/layerwise.md. Students are kept in --work.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from factorization import TEACHERS, measure, minilm, smollm2
from result_lines import add, read
from torch import Tensor
from transformers import PreTrainedModel, default_data_collator

import makd
from makd.data import collator, row_lengths
from makd.distill import DistillTrainer, LayerwiseConfig, TrainingConfig, teach_layers_
from makd.loading import load_model, load_tokenizer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "layerwise.jsonl"
TABLE = ROOT / "docs" / "results" / "layerwise.md"
ARMS = ("start", "whole", "layers", "both")
NAMES = {
    "start": "as factorized", "whole": "whole model", "layers": "layers one by one", "both": "layers, then whole model",
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How a model is taught, and on how much text."""

    make: Callable[..., Any]
    calibration: int
    """Rows that the start is calibrated on."""
    training: int
    """Rows that are learned from, in every arm."""
    plan: makd.Plan
    whole: TrainingConfig
    layers: LayerwiseConfig


SETTINGS = {
    "minilm": Setting(
        minilm, 400, 10**6, makd.Plan(preset="balanced"),
        TrainingConfig(learning_rate=6e-5, batch_size=16), LayerwiseConfig(),
    ),
    "smollm2": Setting(
        smollm2, 64, 96,
        makd.Plan(
            terms=(
                makd.Term(aspect="matrix", layers="every:2"), makd.Term(aspect="hidden"),
                makd.Term(aspect="attention", layers="every:2"), makd.Term(aspect="logits"),
            )
        ),
        TrainingConfig(learning_rate=1e-4, batch_size=4), LayerwiseConfig(),
    ),
}  # fmt: skip


class Bench:
    """One teacher and one start."""

    def __init__(self, words: argparse.Namespace, name: str, keep: float) -> None:
        self.name, self.setting, self.work = name, SETTINGS[name], words.work
        self.layers = replace(
            self.setting.layers,
            **({} if words.layer_rate is None else {"learning_rate": words.layer_rate}),
        )
        self.whole = replace(
            self.setting.whole, **({} if words.whole_rate is None else {"learning_rate": words.whole_rate})
        )
        self.layer_plan = makd.Plan(terms=(makd.Term(aspect="hidden"),)) if words.hidden else self.setting.plan
        self.subject = self.setting.make(words.data, self.setting.calibration)
        self.teacher: PreTrainedModel = self.subject.teacher
        self.tokens = load_tokenizer(TEACHERS[name])
        self.batches = self.setting.make(words.data, self.setting.training).calibration
        self.rows = as_rows(self.batches)
        self.start = self._start(keep)
        self.costs: dict[str, tuple[float, float]] = {}

    def _start(self, keep: float) -> PreTrainedModel:
        folder = self.work / f"{self.name}_{keep}"
        if not (folder / "config.json").is_file():
            budget = makd.Budget(keep_linears=keep)
            makd.factorize(self.teacher, budget, calibration=self.subject.calibration).save_pretrained(folder)
        start = load_model(str(folder))
        start.eval()
        return start

    def teach_whole(self, student: PreTrainedModel, steps: int, seed: int) -> None:
        """Distillation as `makd distill` does it."""
        settings = replace(self.whole, steps=steps)
        rows = self.rows
        with tempfile.TemporaryDirectory() as folder:
            student.requires_grad_(True)
            trainer = DistillTrainer(
                student, self.teacher, self.setting.plan, tokens_per_batch=settings.find_tokens(row_lengths(rows)),
                args=settings.to_arguments(Path(folder), seed, use_cpu=True), train_dataset=rows,
                data_collator=collator(self.tokens, self.teacher) if self.name == "minilm" else default_data_collator,
            )  # fmt: skip
            trainer.train()
        student.eval()

    def teach_layers(self, student: PreTrainedModel, steps: int, seed: int, evaluate: bool = True) -> list[Any]:
        """Each layer for so many steps."""
        every = self.layers.evaluate_every if evaluate else 10**6
        settings = replace(self.layers, steps=steps, evaluate_every=every)
        return [*teach_layers_(student, self.teacher, self.layer_plan, self.batches, settings, seed).values()]

    def steps(self, arm: str, seconds: float) -> int:
        """How many an arm makes in so much processor time, at least one."""
        if arm not in self.costs:
            teach: Callable[..., Any] = self.teach_whole if arm == "whole" else self.teach_layers
            few, more = (self._seconds(teach, count) for count in ((2, 8) if arm == "whole" else (2, 12)))
            each = (more - few) / (6 if arm == "whole" else 10)
            self.costs[arm] = each, max(0.0, few - 2 * each)
        each, once = self.costs[arm]
        return max(1, round((seconds - once) / each))

    def _seconds(self, teach: Callable[..., Any], count: int) -> float:
        student = copy.deepcopy(self.start)
        started = time.process_time()
        teach(student, count, 0)
        return time.process_time() - started

    def cell(self, arm: str, seconds: float, seed: int) -> dict[str, Any]:
        """One student, taught and measured."""
        student, found = copy.deepcopy(self.start), {}
        share = seconds / 2 if arm == "both" else seconds
        plans = {part: self.steps(part, share) for part in ("layers", "whole") if arm in (part, "both")}
        started = time.process_time()
        if "layers" in plans:
            lessons = self.teach_layers(student, plans["layers"], seed)
            found["layer_losses"] = [[round(one["before"], 4), round(one["after"], 4), one["kept"]] for one in lessons]
        if "whole" in plans:
            self.teach_whole(student, plans["whole"], seed)
        return {
            "steps": plans, "processor_seconds": round(time.process_time() - started, 1), **found,
            "rates": {"layers": self.layers.learning_rate, "whole": self.whole.learning_rate},
            **measure(self.subject, student),
        }  # fmt: skip


def as_rows(batches: Sequence[dict[str, Tensor]]) -> Dataset:
    """Batches as rows, without padding."""
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": []}
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            rows["input_ids"].append(ids[mask.bool()].tolist())
            rows["attention_mask"].append([1] * int(mask.sum()))
    return Dataset.from_dict(rows)


def run(words: argparse.Namespace) -> None:
    """Every cell that is not in the results yet, seed by seed."""
    torch.set_num_threads(1)
    for keep in words.keeps:
        key = {"model": words.model, "keep": keep, "seconds": words.seconds, "layer_rate": words.layer_rate,
               "whole_rate": words.whole_rate, "hidden": words.hidden}  # fmt: skip
        missing = [
            (seed, arm) for seed in range(words.seeds) for arm in words.arms
            if not (arm == "start" and seed) and not is_there({**key, "arm": arm, "seed": seed})
        ]  # fmt: skip
        bench = Bench(words, words.model, keep) if missing else None
        for seed, arm in missing:
            assert bench is not None
            add(RESULTS, {**key, "arm": arm, "seed": seed, **bench.cell(arm, words.seconds, seed)})


def is_there(key: dict[str, Any]) -> bool:
    """Whether a cell is in the results."""
    return any(all(row.get(name) == value for name, value in key.items()) for row in read(RESULTS))


def table() -> str:
    """The results as markdown, one table a model, share that is kept, time and rates."""
    rows = read(RESULTS)
    lines = [
        "# Layers one by one, and the whole model",
        "",
        "Written by `python benchmarks/layerwise.py table` from `benchmarks/results/layerwise.jsonl`; its docstring",
        "says what each row is. Means over seeds, ± the standard error where there are two or more. All rows of a",
        "table begin with the same student and learn from the same text. A row that is missing has not been run.",
        "",
        "Layers one by one have a cost before their first step: about four forwards of all the text on one side or",
        "the other, for MiniLM's 722 texts some 70 processor seconds. They are in the seconds here, so that 60 leave",
        "nothing to learn in (1 step, and no better weights). Layers that are fitted on the way have made them anyway.",
        "",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        group = (row["model"], row["keep"], row["seconds"], row["layer_rate"], row["whole_rate"], row["hidden"])
        groups.setdefault(group, []).append(row)
    for group, here in groups.items():
        rates, first = here[0]["rates"], here[0]
        terms = "the hidden states alone" if group[5] else "the recipe's plan"
        lines += [
            f"## {group[0]}, {group[1]:.0%} of the linears' parameters, about {group[2]:g} processor seconds",
            "",
            f"Learning rates: layers {rates['layers']:g} (on {terms}), whole model {rates['whole']:g}. "
            f"{first['machine']}, {first['threads']} thread, torch {first['torch']}, {first['date']}.",
            "",
        ]
        texts = [name for name, value in first.items() if isinstance(value, dict) and name not in ("steps", "rates")]
        scores = [(text, score) for text in texts for score in sorted(first[text], reverse=True)]
        lines += [
            f"| taught | seeds | steps | processor s | {' | '.join(f'{text}: {one}' for text, one in scores)} |",
            f"| --- | ---: | ---: | ---: |{' ---: |' * len(scores)}",
        ]
        for arm in ARMS:
            mine = [row for row in here if row["arm"] == arm]
            if mine:
                steps = ", ".join(f"{part} {count}" for part, count in mine[0]["steps"].items()) or "-"
                seconds = statistics.mean(row["processor_seconds"] for row in mine)
                found = [_mean([row[text][one] for row in mine]) for text, one in scores]
                lines.append(f"| {NAMES[arm]} | {len(mine)} | {steps} | {seconds:.0f} | {' | '.join(found)} |")
        lines.append("")
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    shown = f"{statistics.mean(values):.4g}" if values[0] > 2 else f"{statistics.mean(values):.4f}"
    if len(values) < 2:
        return shown
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{shown} ± {error:.2g}"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="teach and measure")
    runner.add_argument("model", choices=tuple(SETTINGS))
    runner.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.3])
    runner.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    runner.add_argument("--seeds", type=int, default=3)
    runner.add_argument("--seconds", type=float, default=240.0, help="processor time of a cell's teaching")
    runner.add_argument("--layer_rate", type=float, help="learning rate of layers; default: LayerwiseConfig's")
    runner.add_argument("--whole_rate", type=float, help="learning rate of the whole model; default: the recipe's")
    runner.add_argument("--hidden", action="store_true", help="layers learn hidden states alone, not the whole plan")
    runner.add_argument("--work", type=Path, default=Path("runs/layerwise"), help="folder that keeps the starts")
    runner.add_argument("--data", type=Path, default=os.environ.get("MAKD_DATA"), help="default: MAKD_DATA")
    commands.add_parser("table", help="write the results as a page")
    words = parser.parse_args()
    if words.command == "table":
        TABLE.write_text(table(), encoding="utf-8")
        return
    if words.data is None:
        parser.error("the evaluation data is needed: --data FOLDER, or MAKD_DATA in the environment")
    words.data = Path(words.data)
    run(words)


if __name__ == "__main__":
    main()
