"""Products in bfloat16 are told of where they cost time."""

import logging

import pytest
import torch

from makd.config import FinetuneRecipe, Recipe, Stage
from makd.distill import LayerwiseConfig, TrainingConfig, precision, warn_slow_bfloat16

CPU = torch.device("cpu")


@pytest.fixture
def ratio(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The messages of this process are not counted, nor is its processor asked."""
    precision._warn.cache_clear()
    return monkeypatch


def test_a_processor_without_instructions_for_it_is_told_of_once(
    ratio: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ratio.setattr(precision, "bfloat16_ratio", lambda: 9.7)

    with caplog.at_level(logging.WARNING):
        warn_slow_bfloat16(CPU)
        warn_slow_bfloat16(CPU)

    assert [record.message.split(". ")[0] for record in caplog.records] == [
        "On this processor a product in bfloat16 takes 9.7 times as long as in float32"
    ]


def test_nothing_is_said_where_bfloat16_pays_or_is_no_cpu_s_work(
    ratio: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ratio.setattr(precision, "bfloat16_ratio", lambda: 0.5)
    warn_slow_bfloat16(CPU)
    ratio.setattr(precision, "bfloat16_ratio", lambda: 9.7)
    warn_slow_bfloat16(torch.device("cuda"))

    assert not caplog.records


def test_the_ratio_is_that_of_two_products_of_this_machine() -> None:
    seconds = {dtype: precision._seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}

    assert all(0 < taken < 1 for taken in seconds.values())
    assert precision.bfloat16_ratio() == precision.bfloat16_ratio() > 0


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(dtype="bfloat16"),
        Recipe(training=TrainingConfig(precision="bfloat16")),
        Recipe(stages=(Stage(training=TrainingConfig(precision="bfloat16")),)),
        Recipe(layerwise=LayerwiseConfig(precision="bfloat16")),
        FinetuneRecipe(training=TrainingConfig(precision="bfloat16")),
    ],
)
def test_a_recipe_knows_whether_it_uses_bfloat16(recipe: Recipe | FinetuneRecipe) -> None:
    assert recipe.uses_bfloat16
    assert not type(recipe)().uses_bfloat16
