"""A student learns the same in every dtype: its parameters are in float32 while it does."""

import json

import pytest
import torch

import makd
from makd.distill.precision import float32_weights
from makd.errors import SettingError
from makd.loading import load_model, load_tokenizer
from tests.models import batch, tiny
from tests.tasks.test_tasks import PAIRS, write

TEXT = "The student is taught what its teacher says about each word that stands in the text of number "
RATE = 1e-4
"""The default: bfloat16 parameters of about 0.1 lose most steps of this size."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(f"{TEXT}{number} {number * 7919 % 1000}" for number in range(300)))
    return makd.DataConfig(path=str(path), max_length=16)


@pytest.fixture(scope="module")
def sharp_folder(decoder_folder, tmp_path_factory):
    """The tiny decoder, with weights as wide as in trained models."""
    folder = tmp_path_factory.mktemp("sharp")
    model = load_model(str(decoder_folder))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    load_tokenizer(str(decoder_folder)).save_pretrained(folder)
    return str(folder)


def recipe(dtype, steps=60):
    return makd.Recipe(
        dtype=dtype,
        factorize=makd.FactorizeConfig(solver="svd"),
        training=makd.TrainingConfig(steps=steps, batch_size=8, learning_rate=RATE),
        calibration=makd.CalibrationConfig(rows=8),
        evaluation=makd.EvaluationConfig(rows=40, latency=False),
        device="cpu",
    )


@pytest.fixture(scope="module")
def learned(sharp_folder, texts, tmp_path_factory):
    """How much nearer to its teacher a student comes, in nats a token, by dtype."""
    found = {}
    for dtype in ("float32", "bfloat16", "float16"):
        output = tmp_path_factory.mktemp("runs") / "student"
        metrics = makd.compress(sharp_folder, texts, makd.Budget(keep_linears=0.5), recipe(dtype), output).metrics
        fidelity = metrics["fidelity"]
        found[dtype] = fidelity["before"]["prediction_kl"] - fidelity["after"]["prediction_kl"]
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_decoder_learns_at_the_default_rate_what_it_learns_in_float32(learned, dtype):
    assert learned["float32"] > 0.03
    assert learned[dtype] == pytest.approx(learned["float32"], rel=0.05)


def test_float32_weights_are_float32_inside_and_as_they_were_after():
    model = tiny("bert").to(torch.bfloat16)
    model.embeddings.LayerNorm.float()  # what a model keeps in float32 stays so
    before = {name: (parameter.dtype, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    with float32_weights(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_small_steps_add_up_inside_and_are_rounded_once():
    model = tiny("bert").to(torch.bfloat16)
    weight = model.get_parameter("encoder.layer.0.attention.self.query.weight")
    weight.data.fill_(1.0)
    with float32_weights(model):
        for _ in range(100):
            weight.data += 1e-4  # the next bfloat16 after 1 is 1.0078
    assert torch.all(weight == torch.tensor(1.01).bfloat16())


def test_float32_weights_come_back_also_from_an_error():
    model = tiny("bert").half()
    with pytest.raises(KeyError), float32_weights(model):
        raise KeyError
    assert model.dtype == torch.float16


def trainer(student, teacher, tmp_path):
    rows = [{"input_ids": row, "attention_mask": [1] * 12} for row in batch(teacher)["input_ids"].tolist()]
    arguments = makd.TrainingConfig(steps=1, batch_size=4).to_arguments(tmp_path, 0, use_cpu=True)
    return makd.DistillTrainer(student, teacher, "feature", args=arguments, train_dataset=rows)


def test_a_trainer_refuses_a_student_in_float16_and_says_what_to_do(tmp_path):
    with pytest.raises(SettingError, match=r"model\.float\(\).*bf16=True"):
        trainer(tiny("bert").half(), tiny("bert"), tmp_path)


def test_a_trainer_warns_of_a_student_in_bfloat16(tmp_path, caplog):
    trainer(tiny("bert").to(torch.bfloat16), tiny("bert"), tmp_path)
    assert "half as much" in caplog.text
    assert "bf16=True" in caplog.text


def test_frozen_half_precision_parameters_are_nobodys_business(tmp_path, caplog):
    student = tiny("bert").half()
    student.requires_grad_(False)
    student.encoder.layer[0].attention.self.query.float().requires_grad_(True)
    trainer(student, tiny("bert"), tmp_path)
    assert "half as much" not in caplog.text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_finetuning_in_half_precision_learns_in_float32(encoder_folder, tmp_path, dtype):
    path = write(tmp_path / "mrpc", train=PAIRS, validation=PAIRS[:6])
    task = makd.TaskConfig(name="glue/mrpc", path=path, max_length=32)
    start, weights = weights_of(encoder_folder), {}
    for name in ("float32", dtype):
        settings = makd.FinetuneRecipe(
            training=makd.TrainingConfig(steps=10, batch_size=4, learning_rate=1e-3), dtype=name, device="cpu"
        )
        weights[name] = weights_of(makd.finetune(str(encoder_folder), task, settings, tmp_path / name).folder)
    learned = (weights["float32"] - start).norm()
    assert (weights[dtype] - weights["float32"]).norm() < 0.3 * learned


def weights_of(folder):
    """All of an encoder's weights, in a row."""
    return torch.cat([parameter.detach().flatten() for parameter in load_model(str(folder), "base").parameters()])


def test_the_dtype_of_the_run_is_that_of_the_products_too(sharp_folder, texts, tmp_path):
    narrow = makd.compress(
        sharp_folder, texts, makd.Budget(keep_linears=0.5), recipe("bfloat16", steps=2), tmp_path / "narrow"
    )
    assert json.loads((narrow.folder / "metrics.json").read_text())["tokens"]["training"] > 0
    assert makd.TrainingConfig().with_products_in(torch.bfloat16).precision == "bfloat16"
    assert makd.TrainingConfig().with_products_in(torch.float16).precision == "float32"
    assert makd.TrainingConfig(precision="bfloat16").with_products_in(torch.float32).precision == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "teacher", "cache"),
    [
        ("bfloat16", "bfloat16", None),
        ("bfloat16", "float32", None),
        ("float16", "float32", None),
        ("float32", "bfloat16", "caches/x"),
    ],
)
def test_a_teachers_dtype_that_does_nothing_is_refused(dtype, teacher, cache):
    training = makd.TrainingConfig(teacher_dtype=teacher)
    with pytest.raises(makd.MakdError, match=rf"training.teacher_dtype is {teacher}, and .* Leave"):
        makd.Recipe(dtype=dtype, training=training, cache=cache)
    with pytest.raises(makd.MakdError, match=rf"training.teacher_dtype is {teacher}, and .* Leave"):
        makd.Recipe(dtype=dtype, stages=(makd.Stage(training=training),), cache=cache)
    makd.Recipe(training=training)


def test_so_it_is_in_a_comparison():
    text = makd.LanguageConfig(name="text", text=makd.DataConfig(path="pydoc"), dtype="bfloat16")
    with pytest.raises(makd.MakdError, match="does nothing beside dtype bfloat16"):
        makd.Experiment(
            teacher="x", language=(text,), methods=(makd.MethodConfig(name="makd"),), output="unused",
            budgets=(makd.Budget(keep=0.5),), training=makd.TrainingConfig(teacher_dtype="float32"),
        )  # fmt: skip
