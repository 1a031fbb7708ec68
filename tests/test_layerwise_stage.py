"""`recipe.layerwise`: layers taught one by one as a stage of a run."""

import pytest

import makd
from makd import pipeline
from makd.errors import DataError, SettingError
from tests.models import tiny

BUDGET = makd.Budget(keep_linears=0.4)
TEXTS = [f"The {kind} number {index} is a sequence of names." for kind in ("list", "class") for index in range(20)]
LESSON = makd.LayerwiseConfig(steps=10, learning_rate=3e-3)


def recipe(layerwise=LESSON, batch_size=4, **settings):
    return makd.Recipe(
        layerwise=layerwise,
        factorize=makd.FactorizeConfig(solver="svd"),
        training=makd.TrainingConfig(steps=0),
        calibration=makd.CalibrationConfig(rows=16, batch_size=batch_size),
        evaluation=makd.EvaluationConfig(rows=8, latency=False),
        device="cpu",
        **settings,
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("teacher")
    tiny("bert", vocab_size=300, max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def taught(teacher, tmp_path_factory):
    return makd.compress(teacher, TEXTS, BUDGET, recipe(), tmp_path_factory.mktemp("run") / "student")


def test_layers_are_taught_while_they_are_made(taught, teacher, tmp_path):
    metrics = taught.metrics
    assert [lesson["layer"] for lesson in metrics["layerwise"]] == [0, 1]
    assert all(lesson["after"] < lesson["before"] for lesson in metrics["layerwise"])
    assert metrics["tokens"]["layerwise"] == sum(lesson["tokens"] for lesson in metrics["layerwise"]) > 0
    plain = makd.compress(teacher, TEXTS, BUDGET, recipe(makd.LayerwiseConfig()), tmp_path / "student").metrics
    assert metrics["fidelity"]["after"]["cosine"] > plain["fidelity"]["after"]["cosine"]
    assert "layerwise" not in plain


def test_a_student_that_is_only_factorized_is_taught_too(taught, teacher, tmp_path):
    found = pipeline.factorize_only(teacher, TEXTS, BUDGET, recipe(), tmp_path / "student")
    assert found.metrics["fingerprint"] == taught.metrics["fingerprint"]


def test_a_saved_student_is_taught_layer_by_layer(taught, teacher, tmp_path):
    start = tmp_path / "start"
    pipeline.factorize_only(teacher, TEXTS, BUDGET, recipe(makd.LayerwiseConfig()), start)
    found = pipeline.distill(str(start), teacher, TEXTS, recipe(), tmp_path / "student")
    assert found.metrics["fingerprint"] == taught.metrics["fingerprint"]
    assert found.metrics["seconds"]["layerwise"] > 0


def test_a_streamed_student_is_taught_too(taught, teacher, tmp_path):
    found = makd.factorize_streamed(teacher, TEXTS, BUDGET, recipe(), tmp_path / "student")
    assert found.metrics["layerwise"] == taught.metrics["layerwise"]


def test_what_cannot_be_taught_is_refused_before_the_work(tokenizer, tmp_path, monkeypatch):
    model = tiny("albert", vocab_size=300, max_position_embeddings=128)
    monkeypatch.setattr(pipeline, "_factorize", lambda *_: pytest.fail("it went on"))
    with pytest.raises(SettingError, match="its layers share their weights"):
        makd.compress(model, TEXTS, BUDGET, recipe(), tmp_path / "student", tokenizer=tokenizer)


def test_one_batch_is_refused_before_the_work(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_factorize", lambda *_: pytest.fail("it went on"))
    with pytest.raises(DataError, match="at least 2 calibration batches"):
        makd.compress(teacher, TEXTS, BUDGET, recipe(batch_size=16), tmp_path / "student")
