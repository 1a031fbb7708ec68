"""Random numbers of whoever calls makd: they go on as if it had not been called."""

import random

import numpy as np
import pytest
import torch

import makd
from makd.random_state import keeping_random_state
from tests.models import batch, tiny

TEXTS = [f"The list number {index} is a sequence of names." for index in range(30)]
BUDGET = makd.Budget(keep_linears=0.5)
RECIPE = makd.Recipe(
    training=makd.TrainingConfig(steps=1, batch_size=4),
    calibration=makd.CalibrationConfig(rows=8),
    evaluation=makd.EvaluationConfig(rows=4, latency=False),
    device="cpu",
)


def draw():
    return random.random(), np.random.rand(), float(torch.rand(()))


def seed():
    random.seed(5), np.random.seed(6), torch.manual_seed(7)


@pytest.fixture
def expected():
    """What is drawn where makd is not called."""
    seed()
    found = draw()
    seed()
    return found


@pytest.fixture(scope="module")
def models():
    teacher = tiny("bert", vocab_size=300, max_position_embeddings=128)
    return teacher, makd.factorize(teacher, BUDGET, solver="svd")


def compress(teacher, student, tokenizer, folder):
    makd.compress(teacher, TEXTS, BUDGET, RECIPE, folder / "student", tokenizer=tokenizer)


def evaluate(teacher, student, tokenizer, folder):
    makd.evaluate(student, teacher, TEXTS, RECIPE, tokenizer=tokenizer)


def build_cache(teacher, student, tokenizer, folder):
    makd.build_cache(teacher, TEXTS, RECIPE, folder / "cache", tokenizer=tokenizer)


def stream(teacher, student, tokenizer, folder):
    teacher.save_pretrained(folder / "teacher")
    makd.factorize_streamed(str(folder / "teacher"), TEXTS, BUDGET, RECIPE, folder / "student", tokenizer=tokenizer)


def factorize(teacher, student, tokenizer, folder):
    makd.factorize(teacher, BUDGET, calibration=[batch(teacher)], vocabulary="factored")


@pytest.mark.parametrize("call", [compress, evaluate, build_cache, stream, factorize])
def test_are_after_a_call_what_they_are_without_it(call, models, tokenizer, tmp_path, expected):
    call(*models, tokenizer, tmp_path)
    assert draw() == expected


def test_are_those_of_before_after_an_error_too(expected):
    @keeping_random_state()
    def fail():
        draw()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert draw() == expected


def test_a_run_draws_what_its_seed_says_whatever_was_drawn_before(models, tokenizer, tmp_path):
    found = []
    for number in range(2):
        draw()
        output = tmp_path / str(number)
        found.append(makd.compress(models[0], TEXTS, BUDGET, RECIPE, output, tokenizer=tokenizer).metrics)
    assert found[0]["fingerprint"] == found[1]["fingerprint"]
