"""A user's script under FSDP2: two trainings one after the other, each of which shards the student.

torchrun --nproc-per-node 2 sharded.py ENCODER OUTPUT
"""

import sys
from pathlib import Path

import makd
from makd.processes import started
from tests.distill.processes import shard_on_a_cpu
from tests.processes.together import BUDGET, RECIPE, TEXTS

ACCUMULATED = 2
"""Batches of a step, over all processes."""


def recipe(processes: int) -> makd.Recipe:
    stages = tuple(
        makd.Stage(
            plan=makd.Plan(preset=preset),
            training=makd.TrainingConfig(steps=2, batch_size=2, accumulate=ACCUMULATED // processes),
        )
        for preset in ("fast", "feature")
    )
    return makd.Recipe(stages=stages, calibration=RECIPE.calibration, evaluation=RECIPE.evaluation, device="cpu")


def main(encoder: str, output: Path) -> None:
    shard_on_a_cpu()
    makd.compress(encoder, TEXTS, BUDGET, recipe(started.process_count()), output / "student")
    started.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
