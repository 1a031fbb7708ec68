"""How much work a student is worth, as three recipes: what `makd compress --effort` and `makd.effort` stand for.

Each setting is what was measured to pay: `docs/results/effort.md`, by `python benchmarks/effort.py`. Whatever a user
sets besides wins.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from makd.aspects import Plan
from makd.config import CalibrationConfig, Recipe
from makd.distill import TrainingConfig
from makd.kinds import takes
from makd.registry import Registry

EFFORTS: Registry[Mapping[str, Any]] = Registry(
    "effort",
    {
        # to see whether it works at all
        "quick": {"calibration.rows": 100, "plan.preset": "balanced", "training.steps": 40},
        # most of what there is to have
        "normal": {"calibration.rows": 400, "plan.preset": "balanced", "training.steps": 100},
        # a student to be used
        "best": {"calibration.rows": 800, "plan.preset": "balanced", "training.steps": 200},
    },
)
"""Name -> settings of a recipe that are not its defaults, by their dotted names."""

LEARNING_RATE = 6e-5
"""Of all three: a start that is good already wants small steps."""

INSTEAD = {"training.steps": "training.epochs"}
"""A setting -> another one that says the same otherwise: where a user gives that, the first is left to its default."""


def settings_of(name: str) -> dict[str, Any]:
    """What an effort sets, by dotted names inside a recipe.

    Raises:
        UnknownNameError: there is no such effort.
    """
    return {**EFFORTS[name], "training.learning_rate": LEARNING_RATE}


@takes
def effort(name: str) -> Recipe:
    """The recipe of an effort: `quick`, `normal` or `best`. Change a part with `dataclasses.replace`.

    Args:
        name: how much work the student is worth.

    Raises:
        UnknownNameError: there is no such effort.
    """
    wanted = settings_of(name)
    return Recipe(
        calibration=CalibrationConfig(rows=wanted["calibration.rows"]),
        plan=Plan(preset=wanted["plan.preset"]),
        training=replace(
            TrainingConfig(), steps=wanted["training.steps"], learning_rate=wanted["training.learning_rate"]
        ),
    )


def told(name: str, recipe: Recipe) -> str:
    """What was chosen, with what the user has set besides, in a line."""
    training, plan = recipe.training, recipe.plan
    how_long = f"{training.epochs:g} epochs" if training.steps is None else f"{training.steps:,} steps"
    which = "a plan of your own" if plan.terms else f"plan {plan.preset}"
    if recipe.stages:
        how_long, which = f"{len(recipe.stages)} stages", "their plans"
    return (
        f"effort {name}: {recipe.calibration.rows:,} rows to calibrate, then {how_long} of {training.batch_size} rows, "
        f"{which}, learning rate {training.learning_rate:g}"
    )
