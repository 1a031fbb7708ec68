"""What does a training step cost? makd's plans, the same losses written plainly, and other tools, side by side.

    python benchmarks/distillation.py run steps minilm smollm2 llama --peers-python /path/to/python
    python benchmarks/distillation.py run growth          # against length, layers and vocabulary
    python benchmarks/distillation.py run attention       # attention KL alone
    python benchmarks/distillation.py run decode minilm   # one token at a time, teacher and student
    python benchmarks/distillation.py table               # docs/results/distillation.md, and the plots in it
    python benchmarks/distillation.py run steps --quick   # does it run? a minute; nothing is written

A step is the teacher's forward, the student's, losses, backward, clipping and AdamW, inside the tool's own loop. Each
cell is a process; cells that are compared take turns, a step each, and ratios are medians over those rounds. Memory is
the peak of one more step, above what the process held once its libraries were imported: weights, gradients, optimizer
and activations. `--together` bounds how many processes live at once; more cells are compared to the same anchor, makd's
plan `full`, in further rounds. Students keep half of the linears' parameters (plain SVD), texts are random tokens.

`run` adds JSON lines to benchmarks/results/distillation.jsonl; `steps` and `growth` skip cells that are there. Other
tools need an environment of their own: makd's dependencies (it is imported from here), torchdistill, textbrewer,
tensorboardX and trl. torchdistill 1.1.5, TextBrewer 0.2.1.post1 and TRL 1.16.0 ran with transformers 5.24, torch 2.13.
With `--device cuda` the same code measures by CUDA events and torch's own count of memory.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from distilling.attention import compare_attention
from distilling.decode import compare_decoding
from distilling.page import write_page
from distilling.subjects import NAMES, Subject, make
from distilling.turns import take_turns

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "distillation.jsonl"
PAGE = ROOT / "docs" / "results" / "distillation.md"
PLANS = ("full", "logits", "feature", "balanced", "fast")
PEERS = {"torchdistill": ("full", "logits"), "textbrewer": ("feature",), "gkd": ("logits",)}
"""The plan that a tool's losses come nearest to."""
TOKENS = {"minilm": 2048, "smollm2": 512, "llama": 2048, "llama1b": 4096, "tiny": 128}
"""Tokens of a batch: 16 texts of 128, or 1 of 2048. A longer text is a batch by itself."""
GROWTH = {
    "tokens": [(Subject(name="llama", layers=2, vocabulary=8000), length) for length in (128, 512, 2048, 4096, 8192)],
    "layers": [(Subject(name="llama", layers=count, vocabulary=8000), 256) for count in (2, 4, 8, 16)],
    "vocabulary": [(Subject(name="llama", layers=2, vocabulary=size), 256) for size in (8000, 32_000, 128_000)],
}
GROWING = (("makd", "logits"), ("makd", "full"), ("eager", "full"))
LOSSES_AGREE = 1e-3
"""Largest relative difference between makd's and the plain reference's loss at the first step."""


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="measure")
    runner.add_argument("what", choices=("steps", "growth", "attention", "decode"))
    runner.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(NAMES)}")
    runner.add_argument("--lengths", type=int, nargs="+", help="tokens of a text; 128 512 2048, on CUDA to 32768")
    runner.add_argument("--plans", nargs="+", default=PLANS, choices=PLANS)
    runner.add_argument("--tools", nargs="+", default=("makd", "eager", *PEERS), choices=("makd", "eager", *PEERS))
    runner.add_argument("--axes", nargs="+", default=tuple(GROWTH), choices=tuple(GROWTH), help="of growth")
    runner.add_argument("--peers-python", help="interpreter that has the other tools; without it they are left out")
    runner.add_argument("--repeats", type=int, default=5, help="timed steps of a cell")
    runner.add_argument("--warmup", type=int, default=2, help="steps before them")
    runner.add_argument("--together", type=int, default=5, help="processes at once, the anchor's included")
    runner.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    runner.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    runner.add_argument("--threads", type=int, default=2)
    runner.add_argument("--seed", type=int, default=0)
    runner.add_argument("--work", type=Path, help="folder that keeps the models; a temporary one by default")
    runner.add_argument("--results", type=Path, default=RESULTS)
    runner.add_argument("--quick", action="store_true", help="a tiny model, one round, nothing written")
    commands.add_parser("table", help="write the results as a page with plots")
    words = parser.parse_args()
    if words.command == "table":
        write_page(PAGE, read(RESULTS), ROOT / "benchmarks" / "results" / "logits.jsonl")
        return
    for name in words.models:
        if name not in NAMES:
            parser.error(f"there is no model {name!r}; there are {', '.join(NAMES)}")
    if words.quick:
        words.results, words.repeats, words.warmup = None, 1, 1
        words.models, words.lengths = words.models or ["tiny"], words.lengths or [64]
    torch.set_num_threads(words.threads)
    torch.manual_seed(words.seed)
    with tempfile.TemporaryDirectory(prefix="makd-distillation-") as folder:
        words.work = words.work or Path(folder)
        {"steps": steps, "growth": growth, "attention": attention, "decode": decode}[words.what](words)


def steps(words: argparse.Namespace) -> None:
    """Every plan and tool, by model and length."""
    lengths = words.lengths or ((128, 512, 2048) if words.device == "cpu" else (512, 2048, 8192, 32_768))
    for name in words.models or ("minilm", "smollm2", "llama"):
        subject = Subject(name=name)
        for length in lengths:
            compare(words, "steps", subject, length, list(cells(words, subject)), max(lengths))


def growth(words: argparse.Namespace) -> None:
    """Three cells along three axes."""
    for axis in words.axes:
        sizes = [(Subject(name="tiny"), 64)] if words.quick else GROWTH[axis]
        for subject, length in sizes:
            compare(words, f"growth by {axis}", subject, length, list(GROWING), length)


def cells(words: argparse.Namespace, subject: Subject) -> Iterator[tuple[str, str]]:
    """(tool, plan), makd's `full` first, each plan's tools next to each other."""
    for plan in sorted(words.plans, key=PLANS.index):
        for tool in words.tools:
            if tool in PEERS and (plan not in PEERS[tool] or words.peers_python is None):
                continue
            if tool == "torchdistill" and plan == "logits" and not subject.is_decoder:
                continue  # no logits; a pooled embedding would be all its own code
            yield tool, plan


def compare(
    words: argparse.Namespace, mode: str, subject: Subject, length: int, asked: Sequence[tuple[str, str]], longest: int
) -> None:
    """One model at one length: all cells against the first, in as many rounds as `--together` makes of them."""
    key = {"mode": mode, "model": subject.label, "tokens": length, "device": words.device, "dtype": words.dtype,
           "threads": words.threads, "seed": words.seed}  # fmt: skip
    there = {
        (row["tool"], row["plan"])
        for row in read(words.results)
        if all(row.get(name) == value for name, value in key.items())
    }
    missing = [cell for cell in asked if cell not in there]
    if not missing:
        return
    tokens = TOKENS[subject.name] if mode == "steps" else length
    anchor, batch = asked[0], max(1, tokens // length)
    others = [cell for cell in missing if cell != anchor]
    share = max(1, words.together - 1)
    place = make(subject, longest, words.work)
    for start in range(0, max(1, len(others)), share):
        part = [anchor, *others[start : start + share]]
        common = {**key, "subject": asdict(subject), "place": str(place), "batch": batch,
                  "steps": words.warmup + words.repeats + 1}  # fmt: skip
        cell_settings = [{**common, "tool": tool, "plan": plan} for tool, plan in part]
        pythons = [words.peers_python if tool in PEERS else sys.executable for tool, _ in part]
        can = [place_ for place_, (tool, _) in enumerate(part) if tool != "gkd" or subject.is_decoder]
        found = dict(zip(can, take_turns([cell_settings[i] for i in can], [pythons[i] for i in can],
                                         words.warmup, words.repeats), strict=True))  # fmt: skip
        run = f"{time.time():.0f}"
        for place_, (tool, plan) in enumerate(part):
            result = found.get(place_, {"error": "GKD is for models that predict tokens"})
            write(words.results, {**key, "tool": tool, "plan": plan, "batch": batch, "run": run, **result})
        check_losses(part, found)


def check_losses(part: Sequence[tuple[str, str]], found: dict[int, dict[str, Any]]) -> None:
    """The plain reference must minimise what makd does, or its cost says nothing."""
    losses = {cell: found[place].get("first_loss") for place, cell in enumerate(part) if place in found}
    for (tool, plan), loss in losses.items():
        ours = losses.get(("makd", plan))
        if tool == "eager" and loss is not None and ours is not None and abs(loss - ours) > LOSSES_AGREE * abs(ours):
            raise SystemExit(f"The losses of plan {plan!r} differ: makd {ours}, plain reference {loss}.")


def attention(words: argparse.Namespace) -> None:
    """The attention aspect alone."""
    lengths = words.lengths or ((128, 512, 2048) if words.device == "cpu" else (512, 2048, 8192, 32_768))
    for length in lengths:
        for causal in (False, True):
            found = compare_attention(length, causal, words.device, words.dtype, words.repeats, quick=words.quick)
            for method, result in found.items():
                key = {"mode": "attention", "tokens": length, "causal": causal, "method": method, "seed": words.seed,
                       "device": words.device, "dtype": words.dtype, "threads": words.threads}  # fmt: skip
                write(words.results, {**key, **result})


def decode(words: argparse.Namespace) -> None:
    """Milliseconds a token at batch 1."""
    for name in words.models or ("smollm2", "llama"):
        subject = Subject(name=name)
        if not subject.is_decoder:
            raise SystemExit(f"{name} predicts no tokens.")
        context = (words.lengths or [128])[0]
        place = make(subject, 2 * context + 64, words.work)
        found = compare_decoding(place, context, words.device, words.dtype, words.repeats)
        key = {"mode": "decode", "model": name, "context": context, "device": words.device, "dtype": words.dtype,
               "threads": words.threads, "seed": words.seed}  # fmt: skip
        write(words.results, {**key, **found})


def read(results: Path | None) -> list[dict[str, Any]]:
    """All lines."""
    if results is None or not results.is_file():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def write(results: Path | None, row: dict[str, Any]) -> None:
    """One more line, with where and when it was found."""
    name = torch.cuda.get_device_name() if row["device"] == "cuda" else processor()
    where = {"device_name": name, "cores": os.cpu_count(), "torch": torch.__version__, "date": date.today().isoformat(),
             "load": round(os.getloadavg()[0], 1)}  # fmt: skip
    line = json.dumps({**row, **where})
    print(line, flush=True)
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def processor() -> str:
    """Of this machine, as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
