"""Station 10: which variations of a recipe's plan are compared."""

import dataclasses
from collections.abc import Sequence

from makd.anatomy import Anatomy
from makd.aspects import INSIDE, Plan, Term, activate
from makd.config import Recipe
from makd.distill import LayerwiseConfig
from makd.errors import SettingError

WHOLE = "whole plan"
"""Name of the row that the others are compared with."""
OFF = "without "
"""Begins the name of a row that goes without an aspect."""
PREDICTIONS = "predictions only"
"""Name of the row that learns what comes out of the model alone."""


def variations(recipe: Recipe, anatomy: Anatomy, *, labelled: bool = True) -> dict[str, Recipe]:
    """The recipe with its whole plan, without each aspect that the model has, and with predictions alone.

    Layers are not taught one by one in any of them: they were when the students' start was made, for all alike.

    Args:
        recipe: of a run that trains.
        anatomy: of the teacher.
        labelled: whether the rows have labels, without which a preset's `task` teaches nothing.

    Returns:
        Name of a row -> its recipe; the whole plan first. Variations that leave a stage nothing to learn are left out.

    Raises:
        SettingError: the recipe does not train, or its plan has one aspect alone.
    """
    stages = recipe.trainings
    if all(stage.training.steps == 0 for stage in stages):
        raise SettingError(
            "An ablation asks what the aspects bring in training, and this recipe has none: training.steps is 0. "
            "Give it steps, or null for training.epochs."
        )
    terms = [_applying(stage.plan, anatomy, labelled) for stage in stages]
    names = list(dict.fromkeys(term.aspect for own in terms for term in own))
    kept = {f"{OFF}{name}": [_others(own, name) for own in terms] for name in names}
    alone = [[term for term in own if term.place not in INSIDE] for own in terms]
    if alone != terms and alone not in kept.values():
        kept[PREDICTIONS] = alone
    measured = dataclasses.replace(recipe.evaluation, latency=False, samples=0)  # all are of one shape
    taught = dataclasses.replace(recipe, layerwise=LayerwiseConfig(steps=0), evaluation=measured)
    found = {WHOLE: taught}
    found |= {name: _with_terms(taught, own) for name, own in kept.items() if all(own)}
    if len(found) == 1:
        raise SettingError(
            f"An ablation takes one aspect off at a time, and this plan has {' and '.join(names)} alone in a stage. "
            "Take a plan with more aspects, such as `--recipe.plan.preset balanced`."
        )
    return found


def _applying(plan: Plan, anatomy: Anatomy, labelled: bool) -> list[Term]:
    """The terms of `plan`, as they were given, whose aspects the model and the rows have."""
    aspects = {item.term.aspect for item in activate(plan, anatomy).terms}
    if not labelled and not plan.terms:  # of a plan of one's own it is refused
        aspects -= {"task"}
    return [term for term in plan.wanted if term.aspect in aspects]


def _others(terms: Sequence[Term], aspect: str) -> list[Term]:
    return [term for term in terms if term.aspect != aspect]


def _with_terms(recipe: Recipe, terms: Sequence[Sequence[Term]]) -> Recipe:
    """`recipe`, whose trainings have plans of these terms, with the writers of completions that they had."""
    stages = recipe.trainings
    plans = [
        Plan(preset=stage.plan.preset, terms=tuple(own), completions=stage.plan.writers)
        for stage, own in zip(stages, terms, strict=True)
    ]
    if not recipe.stages:
        return dataclasses.replace(recipe, plan=plans[0])
    changed = tuple(dataclasses.replace(stage, plan=plan) for stage, plan in zip(stages, plans, strict=True))
    return dataclasses.replace(recipe, stages=changed)
