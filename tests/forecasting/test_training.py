"""Steps, tokens and memory of a training, before it begins."""

import pytest

import makd
from makd.anatomy import resolve
from makd.factorization.assemble import linear_sizes
from makd.forecasting.shapes import shape_of
from makd.forecasting.training import LEARNING_BYTES, forecast_training
from tests.models import tiny

LENGTHS = [10] * 20


@pytest.fixture(scope="module")
def shape():
    model = tiny("llama")
    anatomy = resolve(model)
    return shape_of(model, anatomy, linear_sizes(model, anatomy))


def told(shape, *trainings, plan="full", asks_teacher=True, lengths=LENGTHS):
    stages = [makd.Stage(plan=makd.Plan(preset=plan), training=training) for training in trainings]
    return forecast_training(shape, 1000, 0.5, stages, [lengths] * len(stages), asks_teacher)


def test_epochs_are_as_many_steps_as_there_are_batches(shape):
    found = told(shape, makd.TrainingConfig(epochs=3.0, batch_size=4))
    assert (found.steps, found.tokens) == (15, 600)
    assert told(shape, makd.TrainingConfig(epochs=3.0, batch_size=4, accumulate=2)).steps == 9


def test_steps_are_as_many_as_are_asked_for(shape):
    found = told(shape, makd.TrainingConfig(steps=7, batch_size=4, accumulate=2))
    assert (found.steps, found.tokens) == (7, 7 * 2 * 40)


def test_stages_add_up(shape):
    one, two = makd.TrainingConfig(steps=7, batch_size=4), makd.TrainingConfig(steps=3, batch_size=2)
    assert told(shape, one, two).steps == 10
    products = [told(shape, *stages).operations.products for stages in ((one,), (two,), (one, two))]
    assert products[2] == pytest.approx(products[0] + products[1])


def test_a_student_that_learns_has_gradients_and_the_moments_of_the_optimizer(shape):
    found = told(shape, makd.TrainingConfig(steps=1), asks_teacher=False)
    assert found.memory.weights == 1000 * LEARNING_BYTES
    assert told(shape, makd.TrainingConfig(steps=1)).memory.weights == 1000 * LEARNING_BYTES + shape.weight_bytes


def test_without_a_teacher_a_step_is_shorter(shape):
    training = makd.TrainingConfig(steps=1)
    alone, both = (told(shape, training, asks_teacher=asks).operations.products for asks in (False, True))
    assert alone < both


def test_comparing_layers_costs_memory_and_time_that_outputs_alone_do_not(shape):
    training = makd.TrainingConfig(steps=1)
    full, logits = told(shape, training), told(shape, training, plan="logits")
    assert full.memory.activations > logits.memory.activations
    assert full.operations.elements > logits.operations.elements
