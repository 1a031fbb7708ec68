"""A broken model or number is an error with a name, never a result: NaN makes no noise by itself."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import makd
from makd import pipeline
from makd.errors import DataError, NumericsError
from makd.run_folder import write_json
from makd.tasks import read_task
from tests.models import batch, tiny
from tests.tasks.test_tasks import PAIRS, write

TEXTS = [f"text number {number} says that {number} follows {number - 1}" for number in range(40)]
NORM = "encoder.layer.1.output.LayerNorm.weight"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(TEXTS))
    return makd.DataConfig(path=str(path), max_length=32)


def recipe(**training):
    return makd.Recipe(
        factorize=makd.FactorizeConfig(solver="svd"),
        training=makd.TrainingConfig(**{"steps": 0, "batch_size": 4, **training}),
        calibration=makd.CalibrationConfig(rows=8),
        evaluation=makd.EvaluationConfig(rows=8, latency=False),
        plan=makd.Plan(preset="feature"),
        device="cpu",
    )


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("task") / "mrpc", train=PAIRS, validation=PAIRS[:6])
    return makd.TaskConfig(name="glue/mrpc", path=path, max_length=32)


@pytest.fixture(scope="module")
def student(encoder_folder, texts, tmp_path_factory):
    """A sound student."""
    return str(
        pipeline.factorize_only(
            str(encoder_folder),
            texts,
            makd.Budget(keep_linears=0.5),
            recipe(),
            tmp_path_factory.mktemp("s") / "student",
        ).folder
    )


def broken(folder, target, value):
    """A copy of a model whose last normalization has `value` in it: NaN, or so large that activations overflow."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    weights[NORM][:] = value
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return str(target)


WORK = {
    "evaluate": lambda model, student, texts, task, output: makd.evaluate(student, model, texts, recipe()),
    "evaluate a student": lambda model, student, texts, task, output: makd.evaluate(model, student, texts, recipe()),
    "distil with 0 steps": lambda model, student, texts, task, output: pipeline.distill(
        student, model, texts, recipe(), output
    ),
    "distil": lambda model, student, texts, task, output: pipeline.distill(
        student, model, texts, recipe(steps=2), output
    ),
    "factorize by svd": lambda model, student, texts, task, output: pipeline.factorize_only(
        model, texts, makd.Budget(keep_linears=0.5), recipe(), output
    ),
    "compress": lambda model, student, texts, task, output: makd.compress(
        model, texts, makd.Budget(keep_linears=0.5), recipe(steps=2), output
    ),
    "finetune with 0 steps": lambda model, student, texts, task, output: makd.finetune(
        model, task, makd.FinetuneRecipe(training=makd.TrainingConfig(steps=0), device="cpu"), output
    ),
    "finetune": lambda model, student, texts, task, output: makd.finetune(
        model, task, makd.FinetuneRecipe(training=makd.TrainingConfig(steps=2, batch_size=4), device="cpu"), output
    ),
}


@pytest.mark.parametrize("value", [math.nan, 3e38], ids=["NaN", "overflowing"])
@pytest.mark.parametrize("work", WORK)
def test_a_model_with_nan_or_whose_activations_overflow_is_refused(
    encoder_folder, student, texts, task, tmp_path, work, value
):
    model = broken(encoder_folder, tmp_path / "model", value)
    with pytest.raises(NumericsError, match=r"NaN or infinity|not finite|The loss on the labels is nan"):
        WORK[work](model, student, texts, task, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_teacher_in_hand_with_nan_is_refused(student, texts, encoder_folder):
    teacher = tiny("bert")
    teacher.get_parameter(NORM).data[0] = math.nan
    with pytest.raises(NumericsError, match="LayerNorm"):
        makd.evaluate(student, teacher, texts, recipe(), tokenizer=str(encoder_folder))


def test_a_float16_teacher_that_overflows_is_told_to_be_wider(encoder_folder, student, texts, tmp_path):
    folder = broken(encoder_folder, tmp_path / "model", 6e4)
    narrow = makd.Recipe(dtype="float16", evaluation=makd.EvaluationConfig(rows=8, latency=False), device="cpu")
    with pytest.raises(NumericsError, match="bfloat16 or float32"):
        makd.evaluate(student, folder, texts, narrow)


FAST = {"learning_rate": 1e39, "warmup": 0.0, "schedule": "constant_with_warmup"}
"""One step of it makes every weight infinite."""


@pytest.mark.parametrize("steps", [1, 3])
def test_a_finetuning_that_diverges_is_no_success(encoder_folder, task, tmp_path, steps):
    training = makd.TrainingConfig(steps=steps, batch_size=4, **FAST)
    with pytest.raises(NumericsError, match="Lower"):
        makd.finetune(
            str(encoder_folder), task, makd.FinetuneRecipe(training=training, device="cpu"), tmp_path / "output"
        )
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("save_every", [None, 1])
def test_a_distillation_that_diverges_in_its_last_step_is_no_success(encoder_folder, texts, tmp_path, save_every):
    with pytest.raises(NumericsError, match=r"Training diverged.*learning_rate"):
        makd.compress(
            str(encoder_folder), texts, makd.Budget(keep_linears=0.5), recipe(steps=1, save_every=save_every, **FAST),
            tmp_path / "output",
        )  # fmt: skip
    assert not (tmp_path / "output").exists()
    assert not [*tmp_path.rglob("checkpoint-*")]  # to go on from


def test_a_trainer_used_from_python_says_that_it_diverged(tmp_path):
    teacher = tiny("bert")
    trainer = makd.DistillTrainer(
        tiny("bert", seed=1), teacher, "feature",
        args=makd.TrainingConfig(steps=1, batch_size=4, **FAST).to_arguments(tmp_path, 0, use_cpu=True),
        train_dataset=[{"input_ids": row, "attention_mask": [1] * 12} for row in batch(teacher)["input_ids"].tolist()],
    )  # fmt: skip
    with pytest.raises(NumericsError, match="Training diverged"):
        trainer.train()


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300])
def test_infinite_labels_of_a_regression_are_refused(tmp_path, value):
    rows = [{"text": f"text {number}", "label": float(number)} for number in range(6)]
    path = write(tmp_path / "data", train=[*rows, {"text": "far out", "label": value}], validation=rows)
    with pytest.raises(DataError, match="infinite"):
        read_task(makd.TaskConfig(name="regression", path=path))


def test_infinite_labels_of_a_classification_are_refused(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": float(number % 2)} for number in range(6)]
    path = write(tmp_path / "data", train=[*rows, {**rows[0], "label": math.inf}], validation=rows)
    with pytest.raises(DataError, match="is infinite"):
        read_task(makd.TaskConfig(name="glue/mrpc", path=path))


# measurements


def test_predictions_that_are_not_finite_have_no_accuracy_perplexity_fidelity_or_fingerprint():
    good, bad = tiny("llama", "causal_lm"), tiny("llama", "causal_lm")
    bad.get_parameter("model.norm.weight").data[3] = math.nan
    inputs = [batch(good)]
    for measure in (
        lambda: makd.fidelity(bad, good, inputs),
        lambda: makd.fidelity(good, bad, inputs),
        lambda: makd.perplexity(bad, inputs),
        lambda: makd.fingerprint(bad),
    ):
        with pytest.raises(NumericsError, match="hold NaN or infinity"):
            measure()


def test_padding_may_hold_anything():
    teacher = tiny("bert")
    inputs = batch(teacher, padded=True)
    padding = ~inputs["attention_mask"].bool()

    def spoil(module, arguments, output):
        output[0][padding] = math.nan
        return output

    handle = teacher.encoder.register_forward_hook(spoil)
    assert makd.fidelity(teacher, teacher, [inputs])["cosine"] == pytest.approx(1.0)
    handle.remove()


def test_a_perplexity_beyond_all_numbers_is_named():
    model = tiny("llama", "causal_lm")
    model.get_parameter("lm_head.weight").data *= 1e6
    with pytest.raises(NumericsError, match="perplexity of the LlamaForCausalLM is infinite"):
        makd.perplexity(model, [batch(model)])


def test_texts_that_are_all_alike_have_no_rank_correlation():
    teacher = tiny("bert")
    row = batch(teacher, padded=False)["input_ids"][:1]
    inputs = {"input_ids": row.repeat(4, 1), "attention_mask": torch.ones(4, 12, dtype=torch.long)}
    assert set(makd.fidelity(teacher, teacher, [inputs])) == {"cosine"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_know_is_named_and_not_written(tmp_path, value):
    with pytest.raises(NumericsError, match=r"task\.after\.1\.f1 is (nan|inf|-inf)"):
        write_json(tmp_path / "metrics.json", {"task": {"after": [{}, {"f1": value}]}})
    assert not (tmp_path / "metrics.json").exists()


def test_json_that_is_written_is_read_the_same(tmp_path):
    content = {"a": [1, 2.5, None, True, "text"], "b": {"c": -1e300}}
    write_json(tmp_path / "metrics.json", content)
    assert json.loads((tmp_path / "metrics.json").read_text()) == content
