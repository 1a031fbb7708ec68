"""Does `--dry_run` tell the truth? Forecasts of memory and time beside what runs of Llama-shaped models then take.

    python benchmarks/forecast.py                         # the models of SHAPES, from memory and from files: minutes
    python benchmarks/forecast.py --hidden 1024 --layers 4 --rows 32 --solver whitened --files

Each run is a process of its own, whose peak of resident memory is that beyond what it had with the libraries. It adds a
JSON line, with date and machine, to benchmarks/results/forecast.jsonl; the lines of now are printed as a table.
"""

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "forecast.jsonl"
SHAPES: list[dict[str, Any]] = [
    {"hidden": 256, "layers": 4, "rows": 32, "solver": "auto", "files": False},
    {"hidden": 512, "layers": 2, "rows": 32, "solver": "auto", "files": False},
    {"hidden": 512, "layers": 4, "rows": 32, "solver": "auto", "files": False},
    {"hidden": 512, "layers": 4, "rows": 128, "solver": "auto", "files": False},
    {"hidden": 1024, "layers": 2, "rows": 32, "solver": "auto", "files": False},
    {"hidden": 512, "layers": 4, "rows": 64, "solver": "whitened", "files": True},
    {"hidden": 1024, "layers": 2, "rows": 64, "solver": "whitened", "files": True},
    {"hidden": 1024, "layers": 2, "rows": 0, "solver": "svd", "files": True},
]
TOKENS, BATCH, VOCABULARY = 128, 8, 4096


def main() -> None:
    """Run one shape, or all, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32, help=f"of {TOKENS} tokens, {BATCH} in a batch")
    parser.add_argument("--solver", default="auto")
    parser.add_argument("--files", action="store_true", help="from files to files")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.here:
        run(settings)
        return
    given = {name: getattr(settings, name) for name in ("hidden", "layers", "rows", "solver", "files")}
    print(f"{'run':44} {'GB':>6} {'forecast':>9} {'seconds':>8} {'forecast':>9}")
    for shape in SHAPES if settings.hidden is None else [given]:
        words = [f"--{name}={value}" for name, value in shape.items() if name != "files"]
        words += ["--files"] if shape["files"] else []
        done = subprocess.run(
            [sys.executable, __file__, "--here", *words], stdout=subprocess.PIPE, check=True, text=True
        )
        line = json.loads(done.stdout.splitlines()[-1])
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        found, told = line["measured"], line["forecast"]
        print(
            f"{' '.join(f'{name}={value}' for name, value in shape.items()):44} {found['bytes'] / 1e9:6.2f} "
            f"{told['bytes'] / 1e9:9.2f} {found['seconds']:8.1f} {told['seconds']:9.1f}",
            flush=True,
        )


def run(settings: argparse.Namespace) -> None:
    """One forecast and one run; prints their JSON line."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import makd
    from makd.factorization.settings import FactorizeConfig
    from makd.factorization.streamed import stream_student
    from makd.factorization.work import Work
    from makd.forecasting.machine import measure_machine
    from makd.forecasting.operations import TextShape
    from makd.forecasting.student import forecast_factorization
    from makd.loading import load_empty_model

    hidden, device = settings.hidden, torch.device("cpu")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=settings.layers, num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128, intermediate_size=hidden * 11 // 4 // 64 * 64, tie_word_embeddings=True,
    )  # fmt: skip
    chosen = FactorizeConfig(solver=settings.solver, ranks="uniform" if settings.files else "auto")
    batches = [
        {"input_ids": torch.randint(0, VOCABULARY, (BATCH, TOKENS)),
         "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)}
        for _ in range(settings.rows // BATCH)
    ]  # fmt: skip
    text = TextShape(tuple((BATCH, TOKENS) for _ in batches))
    budget, speed = makd.Budget(keep_linears=0.5), measure_machine(device, torch.float32)
    measure_machine.cache_clear()
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        save = f"M(LlamaConfig.from_pretrained({folder!r})).save_pretrained({folder!r})"
        code = f"from transformers import LlamaConfig, LlamaForCausalLM as M; {save}"
        subprocess.run([sys.executable, "-c", code], check=True)
        model, files = load_empty_model(folder)
        forecast = forecast_factorization(
            model, makd.resolve(model), budget, chosen, text, from_files=settings.files, beside=torch.get_num_threads()
        )
        del model
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if settings.files:
            model, files = load_empty_model(folder)
            started = time.process_time()
            out = Path(folder) / "out"
            out.mkdir()
            stream_student(model, files, budget, chosen, Work(Path(folder) / "work"), out, batches)
        else:
            teacher = LlamaForCausalLM.from_pretrained(folder)
            started = time.process_time()
            makd.factorize(teacher, budget, solver=settings.solver, calibration=batches)
        seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "run": {name: getattr(settings, name) for name in ("hidden", "layers", "rows", "solver", "files")},
        "measured": {"bytes": 1024 * (peak - before), "seconds": round(seconds, 1)},
        "forecast": {
            "bytes": forecast.memory.total,
            "phase": forecast.memory.when,
            "seconds": round(speed.seconds(forecast.operations), 1),
        },
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
