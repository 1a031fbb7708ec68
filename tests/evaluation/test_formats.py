"""Both models in the formats that they may be served in, and the sentence that says which is the better deal."""

import json
from dataclasses import replace

import pytest

import makd
from makd import pipeline
from makd.errors import SettingError, UnknownNameError
from makd.evaluation.clock import Timing
from makd.evaluation.formats import FormatRow, FormatTiming
from makd.evaluation.verdict import verdicts

DATA = makd.DataConfig(path="pydoc", rows=40, max_length=16)
QUICK = ["--batches", "[2]", "--lengths", "[8]", "--repeats", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, encoder_folder):
    folder = tmp_path_factory.mktemp("made") / "student"
    recipe = makd.Recipe(device="cpu", factorize=makd.FactorizeConfig(solver="svd"))
    pipeline.factorize_only(str(encoder_folder), DATA, makd.Budget(keep_linears=0.5), recipe, folder)
    return folder


def test_both_models_are_measured_in_each_format_on_what_the_student_was_made_with(folder, encoder_folder, run):
    code, out, err = run(
        "bench", folder, "--teacher", encoder_folder, *QUICK, "--formats", "[torch-bfloat16, onnx-int8]"
    )
    assert code == 0, err
    assert "as they may be served" in out
    found = json.loads((folder / "bench.json").read_text())
    rows = {(row["model"], row["format"]): row for row in found["formats"]}
    assert len(rows) == 6  # float32 in torch is always there: all others are in its units
    score = {key: row["scores"]["fidelity"]["cosine"] for key, row in rows.items()}
    assert score["teacher", "torch-float32"] == pytest.approx(1, abs=1e-6)
    assert 0.9 < score["teacher", "onnx-int8"] < 0.99999
    assert rows["teacher", "torch-bfloat16"]["bytes"] == rows["teacher", "torch-float32"]["bytes"] / 2
    assert found["verdicts"][0] in (folder / "README.md").read_text()
    assert "| student | onnx-int8 |" in (folder / "README.md").read_text()


def test_a_decoder_is_read_by_its_file_too(decoder_folder, tmp_path):
    recipe = makd.Recipe(device="cpu", factorize=makd.FactorizeConfig(solver="svd"))
    pipeline.factorize_only(str(decoder_folder), DATA, makd.Budget(keep_linears=0.5), recipe, tmp_path / "student")
    settings = makd.BenchConfig(batches=(2,), lengths=(8,), repeats=1, new_tokens=0, formats=("onnx-float32",))
    rows = makd.bench(str(tmp_path / "student"), str(decoder_folder), settings, card=False).formats
    by_file, by_torch = (row.scores for row in sorted(rows, key=lambda row: row.format) if row.model == "student")
    assert by_file["perplexity"] == pytest.approx(by_torch["perplexity"], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"formats": ("onnx-int4",)}, UnknownNameError, "onnx-int4.*onnx-int8"),
        ({"formats": ("onnx-int8",), "dtype": "bfloat16"}, SettingError, "got device cpu and dtype bfloat16"),
    ],
)
def test_a_format_that_there_is_not_or_that_nothing_is_timed_in_is_refused(settings, error, said):
    with pytest.raises(error, match=said):
        makd.BenchConfig(**settings)


def test_a_student_in_hand_does_not_say_what_to_measure_on(folder, encoder_folder):
    student = makd.loading.load_model(str(folder))
    with pytest.raises(SettingError, match="give data"):
        makd.bench(student, str(encoder_folder), makd.BenchConfig(formats=("onnx-int8",)))


def row(model, name, size, milliseconds, score):
    timing = Timing(milliseconds=milliseconds, fastest=milliseconds, ratio=milliseconds / 100)
    return FormatRow(
        model=model,
        format=name,
        bytes=size,
        timings=(FormatTiming(batch=1, length=128, timing=timing),),
        scores={"task": {"score": score}, "fidelity": {"top1_agreement": 1.0}},
    )


def verdict(student, rounded):
    """Of both in int8, beside a float32 that is as good as each and four times as slow."""
    slow = [row(model, "torch-float32", 90_000_000, 100.0, score)
            for model, score in (("teacher", 0.875), ("student", student[2]))]  # fmt: skip
    rows = (*slow, row("teacher", "onnx-int8", *rounded), row("student", "onnx-int8", *student))
    (sentence,) = verdicts(rows)
    return sentence


@pytest.mark.parametrize(
    ("student", "rounded", "said"),
    [
        ((18_000_000, 20.0, 0.875), (23_000_000, 27.0, 0.872), "1 x 128: The student is the better deal"),
        ((18_000_000, 30.0, 0.855), (23_000_000, 27.0, 0.872), "in bytes, the teacher alone in latency and score"),
        ((25_000_000, 30.0, 0.872), (23_000_000, 27.0, 0.872), "1 x 128: The teacher alone is the better deal"),
        ((23_000_000, 27.1, 0.862), (23_000_000, 27.0, 0.872), "1 x 128: The teacher alone is the better deal"),
        ((18_000_000, 20.0, 0.865), (23_000_000, 27.0, 0.866), "1 x 128: The student is the better deal"),
    ],
    ids=["faster, smaller, as good", "smaller", "slower, larger", "the same, and worse", "as good as what is as fast"],
)
def test_the_sentence_says_which_is_the_better_deal(student, rounded, said):
    sentence = verdict(student, rounded)
    assert said in sentence
    assert f"onnx-int8 teacher 27.0 ms, 23.0 MB, score {rounded[2]}" in sentence


def test_a_rounded_teacher_that_is_worse_than_the_student_is_no_alternative_to_it():
    sentence = verdict((18_000_000, 20.0, 0.875), (5_000_000, 5.0, 0.6))
    assert "student is the better deal" in sentence
    assert "torch-float32 teacher 100.0 ms" in sentence


def test_a_rounded_student_that_lost_its_quality_is_not_the_best_one():
    rows = [row("student", "torch-float32", 70_000_000, 70.0, 0.875), row("student", "onnx-int8", 1, 1.0, 0.6)]
    (sentence,) = verdicts([row("teacher", "torch-float32", 90_000_000, 100.0, 0.875), *rows])
    assert "torch-float32 student 70.0 ms" in sentence


def test_a_score_below_zero_is_told_as_it_is():
    sentence = verdict((18_000_000, 20.0, -0.25), (23_000_000, 27.0, -0.25))
    assert "onnx-int8 student 20.0 ms, 18.0 MB, score -0.25" in sentence


@pytest.mark.parametrize("unit", [0.05, 1.0, 100.0])
def test_of_numbers_nothing_is_said_that_would_hang_on_their_unit(unit):
    def of(model, name, milliseconds, difference):
        return replace(
            row(model, name, 1, milliseconds, 0.0), scores={"fidelity": {"squared_difference": difference * unit**2}}
        )

    rows = [of("teacher", "torch-float32", 100.0, 0.0), of("teacher", "onnx-int8", 27.0, 0.5),
            of("student", "torch-float32", 70.0, 0.1), of("student", "onnx-int8", 20.0, 0.1)]  # fmt: skip
    (sentence,) = verdicts(rows)
    assert "is not said" in sentence
