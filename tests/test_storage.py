"""What a student takes on disk: the checkpoint's dtype is kept, and what is told is what the files have."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import makd
from makd import pipeline
from makd.errors import NumericsError, SettingError
from makd.loading import load_model
from makd.storage import find_save_dtype
from tests.models import tiny

BUDGET = makd.Budget(keep_linears=0.5)


def recipe(steps=0, **settings):
    return makd.Recipe(
        factorize=makd.FactorizeConfig(solver="svd", ranks="uniform"),
        training=makd.TrainingConfig(steps=steps, batch_size=4),
        plan=makd.Plan(preset="feature"),
        calibration=makd.CalibrationConfig(rows=8),
        evaluation=makd.EvaluationConfig(rows=8, latency=False),
        device="cpu",
        **settings,
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(f"text {number} says that {number} follows {number - 1}" for number in range(40)))
    return makd.DataConfig(path=str(path), max_length=32)


@pytest.fixture(scope="module")
def half_folder(encoder_folder, tmp_path_factory):
    """The tiny encoder, stored in float16."""
    folder = tmp_path_factory.mktemp("half") / "model"
    shutil.copytree(encoder_folder, folder)
    model = load_model(str(encoder_folder), dtype=torch.float16)
    model.save_pretrained(folder)
    return str(folder)


def dtypes(folder):
    """Of the weights; a student's identities are whole numbers."""
    weights = load_file(folder / "model.safetensors").values()
    return {weight.dtype for weight in weights if weight.is_floating_point()}


def size(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("stored", "settings", "expected"),
    [
        (torch.float32, {}, torch.float32),
        (torch.float16, {}, torch.float16),
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.float32, {"dtype": "bfloat16"}, torch.bfloat16),
        (torch.float16, {"dtype": "bfloat16"}, torch.float16),
        (torch.float16, {"save_dtype": "float32"}, torch.float32),
        (torch.float32, {"save_dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_a_student_is_saved_in_the_checkpoint_s_dtype_or_in_the_one_asked_for(
    encoder_folder, texts, tmp_path, stored, settings, expected
):
    teacher = tmp_path / "teacher"
    shutil.copytree(encoder_folder, teacher)
    load_model(str(encoder_folder), dtype=stored).save_pretrained(teacher)
    made = pipeline.factorize_only(str(teacher), texts, BUDGET, recipe(**settings), tmp_path / "student")
    assert dtypes(made.folder) == {expected}
    config = json.loads((made.folder / "config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch.")
    assert made.metrics["bytes"] == {"teacher": size(teacher), "student": size(made.folder)}


@pytest.mark.parametrize("steps", [0, 2])
def test_a_student_of_a_float16_teacher_is_measured_as_it_is_saved(half_folder, texts, tmp_path, steps):
    made = makd.compress(half_folder, texts, BUDGET, recipe(steps), tmp_path / "student")
    assert dtypes(made.folder) == {torch.float16}
    assert made.metrics["bytes"]["student"] < made.metrics["bytes"]["teacher"]
    again = makd.evaluate(str(made.folder), half_folder, texts, recipe())
    assert again["fidelity"]["after"] == made.metrics["fidelity"]["after"]
    assert again["bytes"] == made.metrics["bytes"]
    assert makd.fingerprint(load_model(str(made.folder))) == made.metrics["fingerprint"]


def test_a_student_that_is_taught_further_keeps_its_own_dtype(half_folder, encoder_folder, texts, tmp_path):
    first = pipeline.factorize_only(half_folder, texts, BUDGET, recipe(), tmp_path / "first")
    second = pipeline.distill(str(first.folder), str(encoder_folder), texts, recipe(2), tmp_path / "second")
    assert dtypes(second.folder) == {torch.float16}


def test_the_streamed_student_of_a_float16_teacher_is_the_same_file(half_folder, texts, tmp_path):
    whole = pipeline.factorize_only(half_folder, texts, BUDGET, recipe(), tmp_path / "whole")
    streamed = makd.factorize_streamed(half_folder, texts, BUDGET, recipe(), tmp_path / "streamed")
    ours, theirs = (load_file(made.folder / "model.safetensors") for made in (whole, streamed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if ours[name].is_floating_point())
    assert dtypes(streamed.folder) == {torch.float16}
    assert streamed.metrics["bytes"] == whole.metrics["bytes"]


def test_a_fine_tuned_model_keeps_the_checkpoint_s_dtype(half_folder, tmp_path):
    from tests.tasks.test_tasks import PAIRS, write

    path = write(tmp_path / "mrpc", train=PAIRS, validation=PAIRS[:6])
    task = makd.TaskConfig(name="glue/mrpc", path=path, max_length=32)
    settings = makd.FinetuneRecipe(training=makd.TrainingConfig(steps=2, batch_size=4), device="cpu")
    made = makd.finetune(half_folder, task, settings, tmp_path / "teacher")
    assert dtypes(made.folder) == {torch.float16}
    assert makd.fingerprint(load_model(str(made.folder))) == made.metrics["fingerprint"]


def test_a_student_that_does_not_fit_into_the_dtype_of_its_file_is_refused(encoder_folder, texts, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(encoder_folder, teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][50] = 1e5
    save_file(weights, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match=r"word_embeddings.*too narrow"):
        pipeline.factorize_only(str(teacher), texts, BUDGET, recipe(save_dtype="float16"), tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_what_an_architecture_keeps_in_float32_is_kept_on_disk_too(tmp_path):
    from makd.weights.sound import round_weights_, stored_in

    model = tiny("t5", "seq2seq_lm")
    round_weights_(model, torch.float16)
    with stored_in(model, torch.float16):
        model.save_pretrained(tmp_path)
    assert model.dtype == torch.float32
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        found = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert {dtype for name, dtype in found.items() if ".wo." in name} == {torch.float32}
    assert {dtype for name, dtype in found.items() if ".wo." not in name} == {torch.float16}


def test_a_model_in_hand_keeps_its_dtype_and_a_gguf_that_of_the_run():
    assert find_save_dtype("auto", tiny("bert").half(), torch.float32) == torch.float16
    assert find_save_dtype("auto", "nobody/has-this-model", torch.bfloat16) == torch.bfloat16


def test_only_shards_that_belong_to_the_model_are_counted(encoder_folder, texts, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(encoder_folder, teacher)
    own = size(teacher)
    shutil.copy(teacher / "model.safetensors", teacher / "consolidated.safetensors")
    made = pipeline.factorize_only(str(teacher), texts, BUDGET, recipe(), tmp_path / "student")
    assert made.metrics["bytes"]["teacher"] == own


@pytest.mark.parametrize("make", [makd.Recipe, makd.FinetuneRecipe])
def test_an_unknown_dtype_to_save_in_is_refused(make):
    with pytest.raises(SettingError, match=r"save_dtype is one of float32.*auto"):
        make(save_dtype="float8")
