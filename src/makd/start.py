"""How a run's first student is made, and what it depends on: its own factorization is gone on with after a kill."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from makd.config import Recipe
from makd.factorization.settings import FactorizeConfig
from makd.provenance import extensions_of
from makd.ranks.budget import Budget
from makd.run_folder import plain
from makd.solvers import SOLVERS


def start_settings(recipe: Recipe, *, trains: bool) -> FactorizeConfig:
    """How the student is made that a run begins with, which `trains` it afterwards or not.

    Who keeps checkpoints of the training wants the start gone on with too, be it small: states are kept on disk then,
    unless the recipe says where.
    """
    settings = recipe.factorize
    keeps = trains and recipe.keeps_checkpoints
    return replace(settings, store="disk") if keeps and settings.store == "auto" else settings


def reads_text(recipe: Recipe, settings: FactorizeConfig) -> bool:
    """Whether a factorization reads any text: for its solver, or to teach its layers.

    Args:
        recipe: of the run.
        settings: its factorization's, with the solver that `auto` stands for.
    """
    return SOLVERS[settings.solver].needs_text or recipe.layer_teacher is not None


def identify_start(
    teacher: Mapping[str, Any],
    config: Mapping[str, Any],
    budget: Budget,
    recipe: Recipe,
    batches: Iterable[Mapping[str, Tensor]],
) -> dict[str, Any]:
    """All that the weights of a student before training depend on, as JSON knows it.

    Args:
        teacher: what tells its weights from others.
        config: its config.json.
        budget: of the student.
        recipe: of the run.
        batches: calibration text.
    """
    text = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            text.update(name.encode() + str(tuple(batch[name].shape)).encode() + batch[name].cpu().numpy().tobytes())
    return {
        **teacher,
        "budget": plain(budget),
        "head": recipe.head,
        "dtype": recipe.dtype,
        **{f"factorize.{name}": value for name, value in plain(recipe.factorize).items() if name != "store"},
        "layerwise": recipe.layer_teacher and plain([recipe.layerwise, recipe.trainings[0].plan, recipe.seed]),
        "calibration text": text.hexdigest(),
        **extensions_of(plain(recipe), config),
    }
