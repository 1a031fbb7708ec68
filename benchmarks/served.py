"""Writes docs/results/served.md from benchmarks/results/served_*.json and onnx_kernels.jsonl (`make bench-served`).

python benchmarks/served.py
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results" / "served.md"
DEPTHS = {"all": "six layers", "5": "five layers", "4": "four layers"}


def cells(row: dict[str, Any]) -> list[str]:
    """One model in one format, at both batches."""
    times = [f"{point['timing']['milliseconds']:.1f} ({point['timing']['ratio']:.2f})" for point in row["timings"]]
    task, agreement = row["scores"]["task"]["score"], row["scores"]["fidelity"]["top1_agreement"]
    return [row["format"], f"{row['bytes'] / 1e6:.1f}", *times, f"{100 * task:.1f}", f"{100 * agreement:.1f}"]


def main() -> None:
    """See the module's docstring."""
    results = {depth: json.loads((HERE / "results" / f"served_{depth}.json").read_text()) for depth in DEPTHS}
    environment = results["all"]["environment"]
    lines = [
        "# As it is served",
        "",
        "MiniLM-L6 fine-tuned on SST-2, and students with half of its linears' parameters, in all of its layers or",
        "fewer, with higher ranks then. Milliseconds of rows x tokens (in units of the teacher's `torch-float32`",
        "in that turn); MB; accuracy on the 872 rows for validation, agreement with the teacher on 200 of them: %.",
        f"{environment['device_name']}, {environment['threads']} threads. Measured and written by `make bench-served`.",
        "Those of fewer layers were made when the layers that stay were fitted to a teacher without the others, too;",
        "they are fitted to the whole one now, and begin nearer to it.",
        "",
        "| model | format | MB | 1 x 128 | 16 x 128 | accuracy | agreement |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for depth, name in DEPTHS.items():
        rows = results[depth]["formats"]
        if depth == "all":
            lines += ["| " + " | ".join(["teacher", *cells(row)]) + " |" for row in rows if row["model"] == "teacher"]
        lines += ["| " + " | ".join([name, *cells(row)]) + " |" for row in rows if row["model"] == "student"]
    lines += [
        "",
        "Against the int8 ONNX teacher of the same run:",
        "",
        *ratios(results),
        "",
        "What `makd bench` says:",
        "",
    ]
    lines += [f"- {DEPTHS[depth]}, {said}" for depth, found in results.items() for said in found["verdicts"]]
    lines += ["", "## ONNX Runtime's kernels", "", *kernels()]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def ratios(results: dict[str, Any]) -> list[str]:
    """Student / teacher, both in int8 in ONNX Runtime."""
    lines = ["| student | 1 x 128 | 16 x 128 | bytes |", "| --- | ---: | ---: | ---: |"]
    for depth, found in results.items():
        ours, theirs = (
            next(row for row in found["formats"] if (row["model"], row["format"]) == (who, "onnx-int8"))
            for who in ("student", "teacher")
        )
        pairs = zip(ours["timings"], theirs["timings"], strict=True)
        shares = [mine["timing"]["ratio"] / other["timing"]["ratio"] for mine, other in pairs]
        shares.append(ours["bytes"] / theirs["bytes"])
        lines.append(f"| {DEPTHS[depth]} | " + " | ".join(f"{share:.2f}" for share in shares) + " |")
    return lines


def kernels() -> list[str]:
    """What `makd.export.onnx_kernels` gives."""
    lines = [
        "The same files with the exporter's kernels, and with makd's (`benchmarks/onnx_kernels.py`).",
        "",
        "| model | numbers | batch | exporter ms | makd ms | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for line in (HERE / "results" / "onnx_kernels.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        words = [row[key] for key in ("model", "numbers", "batch", "exporter", "makd", "ratio")]
        lines.append("| " + " | ".join(str(word) for word in words) + " |")
    return lines


if __name__ == "__main__":
    main()
