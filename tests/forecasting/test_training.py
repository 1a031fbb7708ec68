"""Steps, tokens and memory of a training, before it begins."""

import re
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import makd
from makd.anatomy import resolve
from makd.errors import RoomError
from makd.factorization.assemble import linear_sizes
from makd.factorization.room import Available, Room
from makd.forecasting.fit import check_memory
from makd.forecasting.learning import LEARNING_BYTES, PARAMETER_BYTES
from makd.forecasting.memory import Memory
from makd.forecasting.operations import TextShape, forward
from makd.forecasting.shapes import shape_of
from makd.forecasting.training import LearnerShape, Spread, forecast_training
from makd.generation import Sampling, generate
from tests.forecasting.measured import peak_bytes
from tests.models import tiny

LENGTHS = [10] * 20


@pytest.fixture(scope="module")
def shape():
    model = tiny("llama")
    anatomy = resolve(model)
    return shape_of(model, anatomy, linear_sizes(model, anatomy))


STUDENT = LearnerShape(parameters=1000, linears=800, kept=0.5, factors=((10, 2, 20), (10, 3, 10)))


def told(shape, *trainings, plan="full", asks_teacher=True, student=STUDENT, spread=None, lengths=LENGTHS):
    stages = [makd.Stage(plan=makd.Plan(preset=plan), training=training) for training in trainings]
    return forecast_training(shape, student, stages, [lengths] * len(stages), asks_teacher, spread)


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


@pytest.mark.parametrize("asks_teacher", [True, False], ids=["live", "from a cache"])
def test_a_student_that_learns_has_gradients_and_moments_and_the_teacher_is_there(shape, asks_teacher):
    found = told(shape, makd.TrainingConfig(steps=1), asks_teacher=asks_teacher)
    assert found.memory.weights == 1000 * 16 + shape.weight_bytes


@pytest.mark.parametrize(
    ("trainable", "learning"), [("all", 1000), ("linears", 800), ("adapters", 4 * (10 + 2 * 2 + 20 + 10 + 2 * 3 + 10))]
)
def test_only_what_learns_has_gradients_and_moments(shape, trainable, learning):
    training = makd.TrainingConfig(steps=1, trainable=trainable, adapter_rank=4)
    found = told(shape, training).memory.weights
    assert found == PARAMETER_BYTES * 1000 + LEARNING_BYTES * learning + shape.weight_bytes


PLAIN = {"steps": 1, "batch_size": 8}
LOWERING = {
    "recipe.training.batch_size": {"batch_size": 4},
    "tokens_per_batch": {"tokens_per_batch": 20},
    "recipe.training.gradient_checkpointing": {"gradient_checkpointing": True},
    "recipe.training.precision bfloat16": {"precision": "bfloat16"},
    "recipe.training.trainable adapters": {"trainable": "adapters", "adapter_rank": 1},
    "or linears": {"trainable": "linears"},
    "a smaller budget": {"student": replace(STUDENT, parameters=900, linears=700)},
    "FSDP over several GPUs": {"spread": Spread(2)},
    "recipe.training.shard_teacher": {"spread": Spread(2), "shard_teacher": True},
}
"""What the advice names -> how it is given."""
LOWERING_OF_WRITING = {
    "recipe.training.batch_size": {"batch_size": 4},
    "tokens_per_batch": {"tokens_per_batch": 20},
    "recipe.training.accumulate": {"accumulate": 16},
    "recipe.plan.completions.max_new_tokens": {"most": 1},
}


@pytest.mark.parametrize("named", LOWERING)
def test_what_the_advice_names_lowers_what_is_asked_for(shape, named):
    given = {name: LOWERING[named][name] for name in LOWERING[named] if name in ("student", "spread")}
    settings = {name: value for name, value in LOWERING[named].items() if name not in given}
    before = told(shape, makd.TrainingConfig(**PLAIN), spread=given.get("spread") if settings else None)
    after = told(shape, makd.TrainingConfig(**{**PLAIN, **settings}), **given)
    assert after.memory.least < before.memory.least


def told_of_writing(shape, most=30, prompt=2, student=STUDENT, **settings):
    """Where the student writes for 32 batches at once, whose steps have one layer's activations alone."""
    training = makd.TrainingConfig(
        **{"steps": 1, "batch_size": 8, "accumulate": 32, "gradient_checkpointing": True, **settings}
    )
    completions = makd.Completions(student_share=0.5, max_new_tokens=most)
    stage = makd.Stage(plan=makd.Plan(preset="gkd", completions=completions), training=training)
    return forecast_training(shape, student, [stage], [[prompt + most] * 64], asks_teacher=True).memory


@pytest.mark.parametrize("named", LOWERING_OF_WRITING)
def test_what_the_advice_names_for_writing_lowers_what_is_asked_for(shape, named):
    before, after = told_of_writing(shape), told_of_writing(shape, **LOWERING_OF_WRITING[named])
    assert before.when == "writing"
    assert after.least < before.least


def test_a_step_whose_completions_are_written_first_has_no_gradients_then(shape):
    assert told_of_writing(shape).weights == 1000 * 12 + shape.weight_bytes


def settings_of(text):
    return set(re.findall(r"recipe\.[a-z_]+(?:\.[a-z_]+)?", text))


@pytest.mark.parametrize(
    ("phases", "lowering"),
    [
        ((Memory("training", weights=1000), Memory("training", activations=1000)), LOWERING),
        ((Memory("writing", activations=1000),), LOWERING_OF_WRITING),
    ],
    ids=["training", "writing"],
)
def test_the_advice_names_nothing_else(phases, lowering):
    texts = []
    for phase in phases:
        with pytest.raises(RoomError) as error:
            check_memory([phase], 0, Available(Room("this machine", 1), Room("the disk", 1)))
        texts.append(str(error.value))
    both = " ".join(texts)
    assert all(named in both for named in lowering)
    assert settings_of(both) == settings_of(" ".join(lowering))


def test_of_stages_the_largest_is_asked_for_and_not_the_largest_batch_of_any(shape):
    small = makd.TrainingConfig(steps=1, batch_size=2)
    large = makd.TrainingConfig(steps=1, batch_size=8, gradient_checkpointing=True)
    alone = max(told(shape, one).memory.total for one in (small, large))
    assert told(shape, small, large).memory.total == alone


def test_where_another_engine_puts_parameters_is_not_refused_for_them(shape):
    training = makd.TrainingConfig(steps=1)
    known, unsure = (told(shape, training, spread=Spread(is_known=known)).memory for known in (True, False))
    assert unsure.total == known.total
    assert known.least - unsure.least == 1000 * 16


@pytest.mark.parametrize(("asks_teacher", "forwards"), [(True, 2.5), (False, 1.5)])
def test_a_step_is_a_forward_of_the_teacher_and_three_by_the_students_share_of_it(shape, asks_teacher, forwards):
    """Its own forward, and a backward that is twice that: to the inputs and to the weights."""
    found = told(shape, makd.TrainingConfig(steps=3, batch_size=4, accumulate=2), asks_teacher=asks_teacher)
    once = sum(forward(layer, TextShape(((4, 10),))).products for layer in shape.layers)
    assert found.operations.products == pytest.approx(3 * 2 * forwards * once)


def test_comparing_layers_costs_memory_and_time_that_outputs_alone_do_not(shape):
    training = makd.TrainingConfig(steps=1)
    full, logits = told(shape, training), told(shape, training, plan="logits")
    assert full.memory.activations > logits.memory.activations
    assert full.operations.elements > logits.operations.elements


@pytest.mark.parametrize(
    ("vocabulary", "layers", "prompt", "most"),
    [(64, 8, 10, 40), (64, 2, 100, 10), (20_000, 2, 10, 10)],
    ids=["keys and values", "a long prompt", "a large vocabulary"],
)
def test_writing_is_said_to_hold_what_a_generation_then_holds(vocabulary, layers, prompt, most):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, intermediate_size=128, max_position_embeddings=128,
        )
    )  # fmt: skip
    anatomy = resolve(model)
    found = told_of_writing(
        shape_of(model, anatomy, linear_sizes(model, anatomy)), most, prompt, batch_size=2, accumulate=8
    )
    assert found.when == "writing"

    def write():
        generate(model, [[5] * prompt] * 16, Sampling(max_new_tokens=most), [], 0, seed=0, batch_size=16)

    write()
    taken = peak_bytes(write)
    assert taken / 1.1 < found.activations < 1.5 * taken


WRITERS = (
    "bloom", "codegen", "gemma2", "gemma3", "gpt2", "gpt_bigcode", "gpt_neox", "llama", "mistral", "opt", "phi3",
    "qwen2", "qwen3",
)  # fmt: skip
"""Families that write text; of Falcon, which repeats keys and values for all heads, more are kept than are counted."""


@pytest.mark.parametrize("family", WRITERS)
def test_of_each_token_that_is_read_its_keys_and_values_are_kept(family):
    model = tiny(family, "causal_lm")
    kept = model(input_ids=torch.randint(3, 60, (2, 5)), use_cache=True).past_key_values
    anatomy = resolve(model)
    layers = shape_of(model, anatomy, linear_sizes(model, anatomy)).layers
    numbers = sum(part.numel() for layer in kept.layers for part in (layer.keys, layer.values))
    assert numbers == 2 * 5 * sum(layer.keys for layer in layers)
