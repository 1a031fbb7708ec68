"""docs/results/distillation.md: tables and plots of what the lines say."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import processes
from result_lines import read

from distilling.plot import draw

Row = dict[str, Any]
EXPRESSES = {
    ("torchdistill", "full"): "all aspects; matrix and hidden by MSELoss, attention and embedding by losses "
    "registered with it",
    ("torchdistill", "logits"): "its KDLoss a token, task",
    ("textbrewer", "feature"): "hidden_mse, attention_mse; a decoder's logits and task; no embedding",
    ("gkd", "logits"): "forward KL of logits; no task",
}
"""What of the plan a peer's row has; makd and the plain reference have all of it."""
PLANS = ("full", "logits", "feature", "balanced", "fast")
AXES = {"tokens": "tokens of a text", "layers": "layers", "vocabulary": "vocabulary"}


def write_page(page: Path, rows: Sequence[Row], chunked: Path) -> None:
    """Write the page, and beside it one plot for each axis of growth that has lines."""
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        "# Distillation: what a step costs",
        "",
        "Written by `python benchmarks/distillation.py table` from `benchmarks/results/distillation.jsonl`; the",
        "script's docstring says what a step is, how memory is counted and which students are trained. Rows of one",
        "table took turns, a step each, in one run; ratios are medians over those turns, against makd's plan",
        "`full`. `eager` is the same losses written plainly (`benchmarks/distilling/reference.py`), equal to makd's",
        "to 1e-3 at the first step. Other tools are torchdistill, TextBrewer and TRL's GKD trainer, with what they",
        "can say of the plan. A row that is missing has not been run.",
        "",
    ]
    for group in _groups(row for row in rows if row["mode"] == "steps"):
        parts += _steps(group)
    parts += _growth(page, [row for row in rows if row["mode"].startswith("growth")])
    parts += _attention([row for row in rows if row["mode"] == "attention"])
    parts += _decode([row for row in rows if row["mode"] == "decode"])
    if chunked.is_file():
        last = json.loads(chunked.read_text(encoding="utf-8").splitlines()[-1])
        parts += [
            "## Logits in chunks", "",
            f"{last['tokens']} tokens, vocabulary {last['vocabulary']:,}, {last['dtype']}: "
            f"{last['memory_ratio']} of the memory and {last['time_ratio']} of the time of whole logits "
            f"(`python benchmarks/logits.py`; {last['machine']}, {last['date']}).", "",
        ]  # fmt: skip
    parts += _processes()
    page.write_text("\n".join(parts), encoding="utf-8")


def _processes() -> list[str]:
    rows = read(processes.RESULTS)
    if not rows:
        return []
    where = f"{rows[-1]['machine']}, torch {rows[-1]['torch']}, {rows[-1]['date']}"
    return [
        "## Two processes", "",
        "A step of 8 rows of 128 tokens, plan `full`, AdamW, in one process with two threads or two with one each",
        f"(`python benchmarks/processes.py run`, whose docstring says how; {where}). Megabytes are of one process:",
        "what it holds of weights and of the optimizer's state, and the peak of its memory in the training. Of a",
        "teacher in pieces the embedding, which is the head as well, stays whole after a forward. Two processes share",
        "two cores: the figure shows what they cost, not what they gain.", "",
        *processes.table().splitlines(), "",
    ]  # fmt: skip


def _groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that were compared, each cell's latest."""
    found: dict[tuple[Any, ...], dict[tuple[str, str], Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("model", "tokens", "device_name", "dtype", "threads"))
        found.setdefault(key, {})[row["tool"], row["plan"]] = row
    return [list(cells.values()) for cells in found.values()]


def _steps(group: Sequence[Row]) -> list[str]:
    first = group[0]
    lines = [
        f"## {first['model']}, {first['batch']} x {first['tokens']} tokens", "", f"{_where(first)}.", "",
        "| plan | tool | seconds | tokens/s | time, of full | of makd's plan | peak MB | memory, of full | losses |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]  # fmt: skip
    by_cell = {(row["tool"], row["plan"]): row for row in group}
    for row in sorted(group, key=lambda row: PLANS.index(row["plan"])):
        expresses = EXPRESSES.get((row["tool"], row["plan"]), "all of the plan")
        if "error" in row:
            lines.append(f"| {row['plan']} | {row['tool']} | not run: {row['error'][:160]} | | | | | | |")
            continue
        ours = by_cell.get(("makd", row["plan"]), {}).get("time_ratio")
        same = "" if ours is None or "time_ratio" not in row else f"{row['time_ratio'] / ours:.2f}"
        rate = row["batch"] * row["tokens"] / row["seconds"]
        lines.append(
            f"| {row['plan']} | {row['tool']} | {row['seconds']:.3f} | {rate:,.0f} | {row.get('time_ratio', '')} | "
            f"{same} | {row['peak_mb']:,.0f} | {row.get('memory_ratio', '')} | {expresses} |"
        )
    logits = by_cell.get(("makd", "logits"), {})
    if "time_ratio" in logits:
        lines += ["", f"makd `full` / `logits`: time {1 / logits['time_ratio']:.2f}, "
                      f"memory {1 / logits['memory_ratio']:.2f}."]  # fmt: skip
    return [*lines, ""]


def _growth(page: Path, rows: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for axis, across in AXES.items():
        series: dict[str, dict[str, dict[float, float]]] = {"seconds": {}, "peak_mb": {}}
        mine = [row for row in rows if row["mode"] == f"growth by {axis}" and "error" not in row]
        for row in mine:
            at = row["tokens"] if axis == "tokens" else float(row["model"].split(f"{axis}=")[1].split()[0])
            for measure, found in series.items():
                found.setdefault(f"{row['tool']} {row['plan']}", {})[at] = row[measure]
        if not mine:
            continue
        picture = page.with_name(f"distillation_{axis}.svg")
        panels = [
            (title, upwards, {name: sorted(points.items()) for name, points in series[measure].items()})
            for title, upwards, measure in (("Time of a step", "seconds", "seconds"), ("Peak memory", "MiB", "peak_mb"))
        ]
        draw(panels, across, picture)
        lines += [f"## Growth with {across}", "", f"Batches of one text; {mine[0]['model']}; {_where(mine[0])}.", "",
                  f"![Time and memory of a step against {across}]({picture.name})", ""]  # fmt: skip
    return lines


def _attention(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    latest = {
        (row["device_name"], row["dtype"], row["threads"], row["tokens"], row["causal"], row["method"]): row
        for row in rows
    }
    lines = ["## Attention KL alone", "", "12 heads of 64, forward and backward, against log-softmax of whole scores.",
             f"{_where(rows[-1])}.", "",
             "| batch x tokens | causal | way | seconds | time, of eager | extra MB | memory, of eager |",
             "| --- | --- | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in sorted(latest.values(), key=lambda row: (row["tokens"], row["causal"])):
        lines.append(
            f"| {row['batch']} x {row['tokens']} | {'yes' if row['causal'] else 'no'} | {row['method']} | "
            f"{row['seconds']:.3f} | {row['time_ratio']} | {row['extra_mb']:,.0f} | {row['memory_ratio']} |"
        )
    return [*lines, ""]


def _decode(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["## One token at a time", "", f"Batch 1, keys and values kept; {_where(rows[-1])}.", "",
             "| model | context | teacher ms | student ms | student / teacher |",
             "| --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for row in {(row["model"], row["context"], row["device_name"], row["dtype"]): row for row in rows}.values():
        both = row["milliseconds"]
        lines.append(
            f"| {row['model']} | {row['context']} | {both['teacher']} | {both['student']} | {row['time_ratio']} |"
        )
    return [*lines, ""]


def _where(row: Row) -> str:
    plural = "" if row["threads"] == 1 else "s"
    threads = f", {row['threads']} thread{plural}" if row["device"] == "cpu" else ""
    when = f"{row['date']}, load average {row['load']}"
    return f"{row['device_name']}{threads}, {row['dtype']}, torch {row['torch']}, seed {row['seed']}, {when}"
