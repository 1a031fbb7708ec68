"""How do memory and time of a factorization grow with a model's depth and width, and with the text?

    python benchmarks/growth.py run                  # some minutes; resumes
    python benchmarks/growth.py run --widths 2048
    python benchmarks/growth.py table

Llama-shaped models with random weights, the default solver, half of the linears. Each runs in a process of its own,
with one thread and its states on disk; a line in benchmarks/results/growth.jsonl says the processor seconds and the
most memory above that of the libraries and the weights. `table` writes docs/results/growth.md and a plot beside it.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from result_lines import read

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "growth.jsonl"
TABLE = ROOT / "docs" / "results" / "growth.md"
PLOT = ROOT / "docs" / "results" / "growth.svg"
MIB = 2**20
LAYERS, WIDTH, TOKENS = 4, 512, 4096
"""Where what is not asked about stands."""
BLOCK = 256
"""Tokens of a row; four rows make a batch."""


def measure(layers: int, width: int, tokens: int) -> dict[str, Any]:
    """One factorization, in this process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import makd

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers, num_attention_heads=width // 64,
        num_key_value_heads=width // 128, vocab_size=8192, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    teacher = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 8192, (tokens // BLOCK, BLOCK))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(4)]
    makd.factorize(tiny(), makd.Budget(keep_linears=0.5), calibration=[batches[0]])  # what is imported late is here now
    student_bytes = sum(p.numel() * p.element_size() for p in teacher.parameters()) // 2
    before, started = _peak(), time.process_time()
    resident = _resident()
    makd.factorize(teacher, makd.Budget(keep_linears=0.5), calibration=batches, store="disk")
    return {
        "layers": layers, "width": width, "tokens": tokens, "cpu_seconds": time.process_time() - started,
        "peak_bytes": max(_peak(), before) - resident, "student_bytes": student_bytes,
    }  # fmt: skip


def tiny() -> Any:
    """A model as small as they get."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=8192,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run(depths: list[int], widths: list[int], texts: list[int]) -> None:
    """Measure what is not measured yet."""
    import torch

    wanted = [(depth, WIDTH, TOKENS) for depth in depths] + [(2, width, TOKENS) for width in widths]
    wanted += [(LAYERS, WIDTH, tokens) for tokens in texts]
    about = {
        "date": datetime.date.today().isoformat(), "processor": platform.processor() or platform.machine(),
        "processors": os.cpu_count(), "torch": torch.__version__,
    }  # fmt: skip
    for layers, width, tokens in dict.fromkeys(wanted):
        if any((row["layers"], row["width"], row["tokens"]) == (layers, width, tokens) for row in read(RESULTS)):
            continue
        command = [sys.executable, __file__, "one", str(layers), str(width), str(tokens)]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
        )
        line = json.dumps({**about, **json.loads(done.stdout.splitlines()[-1])})
        with RESULTS.open("a", encoding="utf-8") as results:
            results.write(line + "\n")
        print(line)


def table() -> str:
    """The page."""
    rows = read(RESULTS)
    told = []
    for name, key, of in (
        ("layers", "layers", lambda row: (row["width"], row["tokens"]) == (WIDTH, TOKENS)),
        ("width", "width", lambda row: (row["layers"], row["tokens"]) == (2, TOKENS)),
        ("tokens of text", "tokens", lambda row: (row["layers"], row["width"]) == (LAYERS, WIDTH)),
    ):
        chosen = sorted((row for row in rows if of(row)), key=lambda row: row[key])
        told += [
            f"| {name} | processor seconds | MiB above libraries and weights | of these the student |",
            "| --- |" + " --- |" * 3,
        ]
        told += [
            f"| {row[key]:,} | {row['cpu_seconds']:.0f} | {row['peak_bytes'] / MIB:.0f} "
            f"| {row['student_bytes'] / MIB:.0f} |"
            for row in chosen
        ]
        told.append("")
    first = rows[0]
    return "\n".join(
        [
            "# How memory and time grow",
            "",
            "Llama-shaped models with random weights, made by `makd.factorize` with the default solver at half of "
            "their linears,",
            f"states on disk, one thread. Where a table does not vary it, a model has {LAYERS} layers (2 where widths "
            f"vary) of width {WIDTH},",
            f"and the text {TOKENS:,} tokens. (`python benchmarks/growth.py run`, then `table`; {first['date']}, "
            f"torch {first['torch']})",
            "",
            "![Memory and time by layers, width and tokens](growth.svg)",
            "",
            *told,
            "Memory does not grow with depth, but for the student itself, which is in memory here (not where it is "
            "streamed);",
            "time grows in proportion. With the width memory grows as its square (second moments of one layer's inputs "
            "and",
            "outputs, in float64), time between its square (products over tokens) and its cube (decompositions).",
            "",
        ]
    )


def plot() -> str:
    """An SVG of the three tables."""
    rows = read(RESULTS)
    panels = (
        ("layers", lambda row: (row["width"], row["tokens"]) == (WIDTH, TOKENS)),
        ("width", lambda row: (row["layers"], row["tokens"]) == (2, TOKENS)),
        ("tokens", lambda row: (row["layers"], row["width"]) == (LAYERS, WIDTH)),
    )
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 300" font-family="sans-serif" font-size="12">',
             '<rect width="900" height="300" fill="white"/>']  # fmt: skip
    for number, (key, of) in enumerate(panels):
        chosen = sorted((row for row in rows if of(row)), key=lambda row: row[key])
        left, most = 50 + 300 * number, max(row[key] for row in chosen)
        for colour, name, value in (
            ("#1f77b4", "MiB", lambda row: (row["peak_bytes"] - row["student_bytes"]) / MIB),
            ("#d62728", "seconds", lambda row: row["cpu_seconds"]),
        ):
            top = max(value(row) for row in chosen)
            points = [(left + 200 * row[key] / most, 250 - 190 * value(row) / top) for row in chosen]
            line = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{colour}"/>' for x, y in points]
            shift = 0 if name == "MiB" else 100
            parts.append(f'<text x="{left + shift}" y="30" fill="{colour}">{name}: up to {top:.0f}</text>')
        parts.append(f'<path d="M{left} 50V250H{left + 220}" fill="none" stroke="black"/>')
        parts += [
            f'<text x="{left + 200 * row[key] / most:.0f}" y="268" text-anchor="middle">{row[key]:,}</text>'
            for row in chosen
            if row[key] * 8 >= most
        ]
        parts.append(f'<text x="{left + 100}" y="288" text-anchor="middle">{key}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--depths", type=int, nargs="*", default=[2, 4, 8, 16])
    runs.add_argument("--widths", type=int, nargs="*", default=[512, 1024, 2048])
    runs.add_argument("--texts", type=int, nargs="*", default=[4096, 16384])
    one = commands.add_parser("one")
    for name in ("layers", "width", "tokens"):
        one.add_argument(name, type=int)
    commands.add_parser("table")
    options = parser.parse_args()
    if options.command == "one":
        print(json.dumps(measure(options.layers, options.width, options.tokens)))
    elif options.command == "run":
        run(options.depths, options.widths, options.texts)
    else:
        TABLE.write_text(table(), encoding="utf-8")
        PLOT.write_text(plot(), encoding="utf-8")


if __name__ == "__main__":
    main()
