"""A user's own script, which every process runs. Writes what each has found to `OUTPUT/RANK.json`.

torchrun --nproc-per-node 2 together.py ENCODER TASK OUTPUT
"""

import json
import os
import sys
from pathlib import Path

import torch

import makd
from makd import pipeline
from makd.distill import check_same_everywhere
from makd.errors import MakdError, SettingError
from makd.processes import started
from makd.processes.first import from_first, in_turn, was_told

TEXTS = [f"The {kind} number {index} is a sequence of names." for kind in ("list", "class") for index in range(10)]
BUDGET = makd.Budget(keep_linears=0.5)
TRAINING = makd.TrainingConfig(steps=2, batch_size=2, log_every=1)
RECIPE = makd.Recipe(
    training=TRAINING,
    calibration=makd.CalibrationConfig(rows=8, batch_size=4),
    evaluation=makd.EvaluationConfig(rows=2, latency=False),
    device="cpu",
)


class Holder:
    """Something with tensors of many kinds, some of them shared."""

    def __init__(self) -> None:
        table = torch.nn.Parameter(torch.randn(5, 3))
        self.table, self.tied = table, table
        self.others = {
            "transposed": torch.randn(4, 6).t(),
            "bfloat16": torch.randn(7).bfloat16(),
            "whole": torch.arange(3),
            "one": torch.tensor(2.5),
            "none": torch.empty(0, 4),
            "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
            "nowhere": torch.empty(3, device="meta"),
        }


def describe(holder: Holder) -> dict[str, object]:
    tensors = {"table": holder.table, **holder.others}
    return {
        "values": {name: t.detach().float().tolist() for name, t in tensors.items() if t.device.type != "meta"},
        "kinds": {
            name: f"{type(t).__name__} {t.dtype} {t.device} {t.stride()} {t.requires_grad}"
            for name, t in tensors.items()
        },
        "tied": holder.table is holder.tied,
    }


def refuse() -> None:
    raise SettingError("this is not allowed")


def fail() -> None:
    raise ZeroDivisionError("by nothing")


def error_of(make: object, how: object) -> list[object]:
    try:
        how(make)
    except Exception as error:
        return [type(error).__name__, str(error), was_told(error)]
    return []


def main(encoder: str, task: str, output: Path) -> None:
    made: list[int] = []
    told: list[str] = []
    found: dict[str, object] = {"first": started.is_first(), "called": started.name()}
    torch.manual_seed(started.process_index())
    found["holder"] = describe(from_first(Holder))
    found["next random number"] = float(torch.rand(1))
    from_first(lambda: made.append(1))
    found["made"] = len(made)
    found["nested"] = from_first(lambda: from_first(started.process_index))
    found["in turn"] = in_turn(started.process_index)
    found["errors"] = [error_of(make, how) for make in (refuse, fail) for how in (from_first, in_turn)]
    given = {"seed": 1, "training rows": f"rows {started.process_index()}"}
    found["given something else"] = error_of(lambda: check_same_everywhere(given), lambda make: make())

    def tell(progress: makd.Progress) -> None:
        told.append(progress.what)

    report = makd.compress(encoder, TEXTS, BUDGET, RECIPE, output / "student", on_progress=tell)
    found["compress"] = [str(report.folder), report.metrics["fingerprint"], report.folder.is_dir()]
    found["told"] = sorted(set(told))
    start = pipeline.factorize_only(encoder, TEXTS, BUDGET, RECIPE, output / "start")
    layers = makd.LayerwiseConfig(steps=2)
    taught = makd.Recipe(
        training=TRAINING, layerwise=layers, calibration=RECIPE.calibration, evaluation=RECIPE.evaluation, device="cpu"
    )
    report = pipeline.distill(str(start.folder), encoder, TEXTS, taught, output / "taught")
    found["distill"] = [report.metrics["fingerprint"], len(report.metrics["layerwise"])]
    found["evaluate"] = makd.evaluate(str(start.folder), encoder, TEXTS, RECIPE)["fidelity"]
    cache = makd.build_cache(encoder, TEXTS, RECIPE, output / "cache")
    found["cache"] = [cache.rows, cache.content["shards"]]
    labelled = makd.TaskConfig(name="glue/mrpc", path=task, max_length=32)
    learner = makd.FinetuneRecipe(training=TRAINING, device="cpu")
    found["finetune"] = makd.finetune(encoder, labelled, learner, output / "learner").metrics["fingerprint"]
    try:
        makd.compress(encoder, TEXTS, BUDGET, RECIPE, output / "student")
    except MakdError as error:
        found["refused"] = [type(error).__name__, str(error)]
    (output / f"{started.process_index()}.json").write_text(json.dumps(found), encoding="utf-8")
    started.close()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
