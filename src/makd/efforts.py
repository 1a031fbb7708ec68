"""How much work a student is worth, as three recipes: what `makd compress --effort` and `makd.effort` stand for.

Text is learned from in steps, a task's rows in passes over them: a task is not learned from a part of its labels. Each
setting is what was measured to pay: `docs/results/effort.md`, by `python benchmarks/effort.py run quick normal best`.
Whatever a user sets besides wins.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from makd.config import Recipe
from makd.kinds import takes
from makd.registry import Registry
from makd.tasks import TaskConfig


@dataclass(frozen=True)
class Effort:
    """Settings of a recipe that are not its defaults, by their dotted names."""

    text: Mapping[str, Any]
    """Of runs on text without labels."""
    task: Mapping[str, Any]
    """Of runs on the rows of a task."""


_BALANCED = {"plan.preset": "balanced"}
_TEXT = {**_BALANCED, "training.learning_rate": 1e-4}
# batches, schedule and learning rate of the comparison on GLUE, where one search found the last
_TASK = {**_BALANCED, "calibration.rows": 400, "training.batch_size": 32, "training.learning_rate": 1.9e-4}

EFFORTS: Registry[Effort] = Registry(
    "effort",
    {
        # the start alone: as many seconds of training would take from it (docs/results/effort.md)
        "quick": Effort({**_TEXT, "calibration.rows": 200, "training.steps": 0}, {**_TASK, "training.steps": 0}),
        # most of what there is to have
        "normal": Effort({**_TEXT, "calibration.rows": 800, "training.steps": 300}, {**_TASK, "training.epochs": 2.0}),
        # a student to be used
        "best": Effort({**_TEXT, "calibration.rows": 1600, "training.steps": 1200}, {**_TASK, "training.epochs": 4.0}),
    },
)

INSTEAD = {"training.steps": "training.epochs", "training.epochs": "training.steps"}
"""A setting -> another one that says the same otherwise: where a user gives that, the first is left to its default."""

OF_STAGES = ("plan.", "training.")
"""How settings begin that stages have each for itself: where a user gives stages, these are left to their defaults."""


def settings_of(name: str, data: object = None) -> dict[str, Any]:
    """What an effort sets, by dotted names inside a recipe.

    Args:
        name: of the effort.
        data: what the run is on: a `TaskConfig`, or anything else for text.

    Raises:
        UnknownNameError: there is no such effort.
    """
    chosen = EFFORTS[name]
    return dict(chosen.task if isinstance(data, TaskConfig) else chosen.text)


@takes
def effort(name: str, data: object = None) -> Recipe:
    """The recipe of an effort: `quick`, `normal` or `best`. Change a part with `dataclasses.replace`.

    Args:
        name: how much work the student is worth.
        data: what the run is on, as `compress` takes it: rows of a task are learned from in passes, text in steps.

    Raises:
        UnknownNameError: there is no such effort.
    """
    parts: dict[str, dict[str, Any]] = {}
    for setting, value in settings_of(name, data).items():
        part, leaf = setting.split(".")
        parts.setdefault(part, {})[leaf] = value
    own = Recipe()
    return Recipe(**{part: dataclasses.replace(getattr(own, part), **changed) for part, changed in parts.items()})


def describe_effort(name: str, recipe: Recipe) -> str:
    """What was chosen, with what the user has set besides, in a line."""
    training, plan = recipe.training, recipe.plan
    begin = f"effort {name}: {recipe.calibration.rows:,} rows to calibrate"
    if recipe.stages:
        return f"{begin}, then the recipe's own {len(recipe.stages)} stages"
    if training.steps == 0:
        return f"{begin}, and no training"
    how_long = f"{training.epochs:g} epochs" if training.steps is None else f"{training.steps:,} steps"
    which = "a plan of your own" if plan.terms else f"plan {plan.preset}"
    return f"{begin}, then {how_long} of {training.batch_size} rows, {which}, learning rate {training.learning_rate:g}"
