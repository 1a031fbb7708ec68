"""The whole path from Python: names or objects, a list of texts, and what comes back."""

import json
import logging
import shutil
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import makd
from makd import pipeline
from makd.errors import UnsupportedModelError
from makd.loading import load_model
from makd.preparation import prepare
from tests.flash import set_flash
from tests.models import tiny

BUDGET = makd.Budget(keep_linears=0.5)
TEXTS = [f"The {kind} number {index} is a sequence of names." for kind in ("list", "class") for index in range(20)]


def quick(seed=0, steps=2, **settings):
    return makd.Recipe(
        training=makd.TrainingConfig(steps=steps, batch_size=4),
        calibration=makd.CalibrationConfig(rows=16),
        evaluation=makd.EvaluationConfig(rows=8, latency=False),
        device="cpu",
        seed=seed,
        **settings,
    )


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, tokenizer):
    """A teacher that reads as many tokens as texts in hand are cut to."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny("bert", vocab_size=300, max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("decoder")
    tiny("llama", "causal_lm", vocab_size=300, max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def report(teacher_folder, tmp_path_factory):
    """A run from names, on a list of texts."""
    output = tmp_path_factory.mktemp("pipeline") / "student"
    return makd.compress(str(teacher_folder), TEXTS, BUDGET, quick(), output)


def test_the_report_has_the_measurements_and_the_folder(report):
    metrics = report.metrics
    assert metrics == json.loads((report.folder / "metrics.json").read_text())
    assert metrics.keys() == {
        "params",
        "bytes",
        "fidelity",
        "shared_inputs",
        "seconds",
        "tokens",
        "measured_on",
        "fingerprint",
    }
    assert metrics["bytes"]["student"] == (report.folder / "model.safetensors").stat().st_size
    assert metrics["fidelity"].keys() == {"before", "after"}
    student = AutoModel.from_pretrained(report.folder)
    assert metrics["params"]["total"]["student"] == sum(parameter.numel() for parameter in student.parameters())
    assert metrics["fingerprint"] == makd.fingerprint(student)


def test_a_model_and_a_tokenizer_in_hand_give_the_same_student_as_their_names(report, teacher_folder, tmp_path):
    teacher, tokenizer = AutoModel.from_pretrained(teacher_folder), AutoTokenizer.from_pretrained(teacher_folder)
    found = makd.compress(teacher, TEXTS, BUDGET, quick(), tmp_path / "student", tokenizer=tokenizer)
    assert found.metrics["fingerprint"] == report.metrics["fingerprint"]
    assert (tmp_path / "student" / "tokenizer.json").is_file()


def test_a_teacher_in_hand_is_not_changed(teacher_folder, tmp_path):
    teacher = AutoModel.from_pretrained(teacher_folder)
    before = makd.fingerprint(teacher)
    makd.compress(teacher, TEXTS, BUDGET, quick(), tmp_path / "student")
    assert makd.fingerprint(teacher) == before
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_a_tokenizer_that_was_made_in_python_is_called_by_its_class(tokenizer, tmp_path, monkeypatch):
    """And not by an empty name, which would be the working directory's: its outputs could not be replaced."""
    monkeypatch.chdir(tmp_path)
    teacher = tiny("bert", vocab_size=300, max_position_embeddings=128)
    for _ in range(2):
        found = pipeline.factorize_only(teacher, TEXTS, BUDGET, quick(), tokenizer=tokenizer, overwrite=True)
    written = yaml.safe_load((found.folder / "recipe.yaml").read_text())
    assert (written["teacher"], written["tokenizer"]) == ("BertModel", type(tokenizer).__name__)


def test_a_frozen_teacher_gives_the_same_student(report, teacher_folder, tmp_path):
    teacher = AutoModel.from_pretrained(teacher_folder).requires_grad_(False)
    found = makd.compress(teacher, TEXTS, BUDGET, quick(), tmp_path / "student")
    assert found.metrics["fingerprint"] == report.metrics["fingerprint"]
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_texts_in_a_file_give_the_same_student_as_in_a_list(report, teacher_folder, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    found = makd.compress(str(teacher_folder), str(tmp_path / "texts.txt"), BUDGET, quick(), tmp_path / "student")
    assert found.metrics["fingerprint"] == report.metrics["fingerprint"]


def test_another_seed_gives_another_student(report, teacher_folder, tmp_path):
    found = makd.compress(str(teacher_folder), TEXTS, BUDGET, quick(seed=1), tmp_path / "student")
    assert found.metrics["fingerprint"] != report.metrics["fingerprint"]


def test_a_saved_student_is_evaluated_as_it_was(report, teacher_folder):
    found = makd.evaluate(str(report.folder), str(teacher_folder), TEXTS, quick())
    assert found["fidelity"]["after"] == pytest.approx(report.metrics["fidelity"]["after"], rel=1e-5)
    assert found["params"] == report.metrics["params"]


def test_texts_in_hand_that_are_cut_are_warned_of_since_nobody_chose_their_length(teacher_folder, caplog):
    teacher, words = load_model(str(teacher_folder)), AutoTokenizer.from_pretrained(teacher_folder)
    texts = [*TEXTS, *(f"{text} " * 40 for text in TEXTS)]
    prepare(texts, words, teacher, quick())
    told = [record for record in caplog.records if "cut there" in record.message]
    assert {record.levelname for record in told} == {"WARNING"}
    assert "longer than the length of texts in hand (of those in a file, data.max_length) = 128" in told[0].message


def test_rows_of_a_file_that_are_cut_are_told_and_not_warned_of(teacher_folder, tmp_path, caplog):
    teacher, words = load_model(str(teacher_folder)), AutoTokenizer.from_pretrained(teacher_folder)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(f"{text} " * 40 for text in TEXTS), encoding="utf-8")
    with caplog.at_level("INFO"):
        prepare(makd.DataConfig(path=str(file)), words, teacher, quick())
    told = [record for record in caplog.records if "cut there" in record.message]
    assert {record.levelname for record in told} == {"INFO"}
    assert "longer than data.max_length = 128" in told[0].message


def test_no_steps_leave_the_student_as_it_was_factorized(teacher_folder, tmp_path):
    found = makd.compress(str(teacher_folder), TEXTS, BUDGET, quick(steps=0), tmp_path / "student").metrics
    assert found["fidelity"]["before"] == found["fidelity"]["after"]
    assert found["tokens"]["training"] == 0


def test_a_teacher_in_bfloat16_gives_a_student_in_bfloat16(decoder_folder, tmp_path):
    texts = [f"{text} " * 10 for text in TEXTS]  # enough for blocks of 128 tokens
    report = makd.compress(str(decoder_folder), texts, BUDGET, quick(dtype="bfloat16"), tmp_path / "student")
    student = AutoModelForCausalLM.from_pretrained(report.folder)
    assert {str(parameter.dtype) for parameter in student.parameters()} == {"torch.bfloat16"}
    assert makd.fingerprint(student) == report.metrics["fingerprint"]


def test_a_student_of_a_list_says_that_its_text_is_not_known(report):
    assert yaml.safe_load((report.folder / "recipe.yaml").read_text())["data"] is None
    assert "Its texts were in hand" in (report.folder / "README.md").read_text()
    with pytest.raises(makd.MakdError, match="texts in hand"):
        pipeline.data_of(str(report.folder))


@pytest.mark.parametrize(
    ("part", "other"), [("data", {"pth": "texts.txt"}), ("task", {"name": "squad", "pth": "data/squad"})]
)
def test_a_setting_that_a_recipe_misspells_is_named(tmp_path, part, other):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data": None, "task": None, part: other}))
    with pytest.raises(makd.MakdError, match=f"Unknown setting of a?.?{part} 'pth'. Did you mean 'path'"):
        pipeline.data_of(str(tmp_path))


def test_progress_is_told_for_every_stage_and_touches_no_number(report, teacher_folder, tmp_path):
    told = []
    heard = makd.compress(str(teacher_folder), TEXTS, BUDGET, quick(), tmp_path / "student", on_progress=told.append)
    assert heard.metrics["fingerprint"] == report.metrics["fingerprint"]
    assert {"load", "calibrate", "gradients", "fit layers", "distil", "evaluate", "save"} <= {
        word.what for word in told
    }
    assert all(0 <= word.done <= word.of for word in told)
    last = {word.what: word for word in told}  # every stage comes to its end
    assert all(word.done == word.of for word in last.values())
    assert last["distil"].tokens == report.metrics["tokens"]["training"]


def test_rows_that_are_measured_on_are_told_apart(report, teacher_folder, tmp_path):
    names = str(report.folder), str(teacher_folder)
    again = pipeline.evaluate(*names, TEXTS, quick())["measured_on"]
    other = pipeline.evaluate(*names, [text.replace("names", "words") for text in TEXTS], quick())["measured_on"]
    assert again == report.metrics["measured_on"] != other


class TestTokensOfCalibration:
    """Only text that a solver read is counted."""

    def test_are_counted_where_factors_were_fitted(self, report):
        assert report.metrics["tokens"]["calibration"] > 100

    def test_are_not_spoken_of_by_a_solver_that_reads_none(self, teacher_folder, tmp_path):
        recipe = quick(factorize=makd.FactorizeConfig(solver="svd"))
        found = pipeline.factorize_only(str(teacher_folder), TEXTS, BUDGET, recipe, tmp_path / "student").metrics
        assert found["tokens"].keys() == {"training", "evaluation"}

    def test_are_not_spoken_of_where_a_student_was_there(self, report, teacher_folder, tmp_path):
        names = str(report.folder), str(teacher_folder)
        taught = pipeline.distill(*names, TEXTS, quick(), tmp_path / "taught").metrics
        assert "calibration" not in taught["tokens"]
        assert "calibration" not in pipeline.evaluate(*names, TEXTS, quick())["tokens"]


class TestWeightsThatWereChanged:
    """Numbers as sound as those that makd saved: only the list of what it saved can tell."""

    WARNING = "are not those that makd saved there (model.safetensors differs)"

    @pytest.fixture
    def student(self, report, tmp_path):
        return shutil.copytree(report.folder, tmp_path / "student")

    def evaluate(self, student, teacher_folder, caplog):
        with caplog.at_level(logging.WARNING):
            makd.evaluate(str(student), str(teacher_folder), TEXTS, quick())
        return caplog.text

    def test_are_told_where_a_matrix_is_transposed(self, student, teacher_folder, caplog):
        weights = load_file(student / "model.safetensors")
        name = next(name for name, one in weights.items() if one.dim() == 2 and one.shape[0] == one.shape[1])
        save_file({**weights, name: weights[name].T.contiguous()}, student / "model.safetensors", {"format": "pt"})
        assert self.WARNING in self.evaluate(student, teacher_folder, caplog)

    def test_are_told_where_a_student_was_trained_further_and_saved_in_its_place(self, student, teacher_folder, caplog):
        model = AutoModel.from_pretrained(student)
        model.get_parameter("encoder.layer.0.attention.self.query.reduce.weight").data += 0.01
        model.save_pretrained(student)
        assert self.WARNING in self.evaluate(student, teacher_folder, caplog)

    def test_are_not_told_where_there_are_none(self, student, teacher_folder, caplog):
        assert "makd saved there" not in self.evaluate(student, teacher_folder, caplog)

    def test_are_not_looked_for_in_students_of_older_versions(self, student, teacher_folder, caplog):
        (student / "makd.json").unlink()
        assert "makd saved there" not in self.evaluate(student, teacher_folder, caplog)


@pytest.mark.parametrize("command", [makd.compress, pipeline.factorize_only])
def test_a_student_that_is_given_as_teacher_is_told_so(command, tokenizer, tmp_path):
    teacher = tiny("llama", "causal_lm", intermediate_size=256, vocab_size=300)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.2), solver="svd")
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    with pytest.raises(makd.MakdError, match="The teacher is factored already"):
        command(str(tmp_path / "student"), TEXTS * 20, makd.Budget(keep_linears=0.5), output=tmp_path / "again")


def test_a_teacher_is_not_taught_to_mimic_itself(teacher_folder, tmp_path):
    with pytest.raises(makd.MakdError, match="is the teacher: there is nothing to learn"):
        pipeline.distill(str(teacher_folder), str(teacher_folder), TEXTS, output=tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_teacher_whose_student_could_not_learn_by_its_attention_is_refused_before_any_work(tmp_path, teacher_folder):
    teacher = set_flash(AutoModel.from_pretrained(teacher_folder, dtype=torch.bfloat16))
    with pytest.raises(UnsupportedModelError, match=r"takes 16 bits alone, and a student, .* learns in float32"):
        makd.compress(teacher, TEXTS, BUDGET, quick(dtype="bfloat16"), tmp_path / "student")
    made = makd.compress(teacher, TEXTS, BUDGET, quick(steps=0, dtype="bfloat16"), tmp_path / "student")
    assert "after" in made.metrics["fidelity"]


class TestAStudentOfAnotherBuild:
    """Models that makd did not factorize from their teacher: each is read by its own anatomy."""

    @pytest.fixture
    def taught(self, teacher_folder, tokenizer, tmp_path):
        """Teach one of these; gives it and what the run left."""

        def run(name, **sizes):
            student = tiny(name, vocab_size=300, max_position_embeddings=128, **sizes)
            student.save_pretrained(tmp_path / "student")
            tokenizer.save_pretrained(tmp_path / "student")
            names = str(tmp_path / "student"), str(teacher_folder)
            report = pipeline.distill(*names, TEXTS, quick(), tmp_path / "taught")
            files = ("linears", "layers")
            found = {name: json.loads((report.folder / "report" / f"{name}.json").read_text()) for name in files}
            return student, report.metrics, found

        return run

    def test_each_side_s_linears_are_counted_by_its_own_names(self, taught, teacher_folder):
        student, metrics, found = taught("distilbert")
        teacher = load_model(str(teacher_folder))
        for side, model in (("teacher", teacher), ("student", student)):
            assert metrics["params"]["linears"][side] == makd.inspect(model).linear_parameters
        assert [row["name"] for row in found["linears"]["linears"]] == list(makd.resolve(student).linears)

    def test_what_has_another_width_is_said_not_to_be_compared(self, taught):
        _, _, found = taught("bert", intermediate_size=32)
        assert found["layers"]["after"]["missing"]["matrix"] == "up is 32 wide beside the teacher's 64 in layers 0, 1"
        measured = {row["name"]: row["measured_error"]["after"] for row in found["linears"]["linears"]}
        assert [name for name, error in measured.items() if error is None] == [
            f"encoder.layer.{layer}.intermediate.dense" for layer in (0, 1)
        ]


def test_layers_that_a_student_does_without_are_still_the_teacher_s(teacher_folder, tmp_path):
    recipe = quick(factorize=makd.FactorizeConfig(depth=1))
    metrics = pipeline.factorize_only(str(teacher_folder), TEXTS, makd.Budget(keep=0.9), recipe, tmp_path / "s").metrics
    assert metrics["params"]["linears"]["teacher"] == makd.inspect(load_model(str(teacher_folder))).linear_parameters


def test_adapters_without_what_makes_them_are_refused_before_there_is_a_student(teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    recipe, told = replace(quick(), training=makd.TrainingConfig(steps=2, trainable="adapters")), []
    with pytest.raises(makd.MakdError, match=r"needs peft: pip install 'makd\[adapters\]'"):
        makd.compress(str(teacher_folder), TEXTS, BUDGET, recipe, tmp_path / "out", on_progress=told.append)
    assert {progress.what for progress in told} == {"load"}


def test_adapters_on_a_student_without_factors_are_refused_before_it_is_measured(teacher_folder, tokenizer, tmp_path):
    tiny("bert", seed=1, vocab_size=300, max_position_embeddings=128).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    recipe, told = replace(quick(), training=makd.TrainingConfig(steps=2, trainable="adapters")), []
    names = str(tmp_path / "dense"), str(teacher_folder)
    with pytest.raises(makd.MakdError, match="has no factors to put them on"):
        pipeline.distill(*names, TEXTS, recipe, tmp_path / "out", on_progress=told.append)
    assert {progress.what for progress in told} == {"load"}


CHATS = "".join(json.dumps({"prompt": text[:20], "completion": text[20:]}) + "\n" for text in TEXTS)
REPLAY = makd.Plan(terms=(makd.Term(aspect="logits"),), completions=makd.Completions(student_share=1.0, replay=1))


@pytest.mark.parametrize(
    ("name", "head", "plan", "hint"),
    [
        ("t5", "seq2seq_lm", makd.Plan(preset="gkd"), "by causal language models alone"),
        ("llama", "causal_lm", REPLAY, "keeps 1 completions"),
        ("llama", "causal_lm", makd.Plan(terms=(makd.Term(aspect="relation"),)), "12 relation_heads do not divide"),
    ],
)
@pytest.mark.parametrize("staged", [False, True])
def test_what_a_training_would_refuse_is_refused_before_there_is_a_student(
    name, head, plan, hint, staged, tokenizer, tmp_path
):
    teacher = tiny(name, head, vocab_size=300, **({} if name == "t5" else {"max_position_embeddings": 128}))
    few = makd.TrainingConfig(steps=1, batch_size=4)
    first = makd.Stage(plan=makd.Plan(preset="kd"), training=few)
    plans = {"stages": (first, makd.Stage(plan=plan, training=few))} if staged else {"plan": plan, "training": few}
    recipe = makd.Recipe(evaluation=makd.EvaluationConfig(rows=8, latency=False), device="cpu", **plans)
    (tmp_path / "chats.jsonl").write_text(CHATS)
    data = makd.DataConfig(path=str(tmp_path / "chats.jsonl"), template="none", max_length=64)
    told = []
    with pytest.raises(makd.MakdError, match=hint):
        makd.compress(teacher, data, BUDGET, recipe, tmp_path / "out", tokenizer=tokenizer, on_progress=told.append)
    assert {progress.what for progress in told} == {"load"}
