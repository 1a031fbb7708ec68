"""From a base model to a task's teacher, and on to a student of that task."""

import json
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

import makd
from makd import pipeline
from makd.cli.main import main
from makd.data import collator
from makd.errors import OutputError, SettingError
from makd.evaluation import speed as measuring
from makd.loading import load_model
from makd.student.hub import is_student
from makd.tasks import Task, load_task
from tests.models import tiny
from tests.tasks.test_tasks import PAIRS, write

STEPS = makd.TrainingConfig(steps=2, batch_size=4)
RECIPE = makd.FinetuneRecipe(training=STEPS, device="cpu")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("task") / "mrpc", train=PAIRS, validation=PAIRS[:6])
    return makd.TaskConfig(name="glue/mrpc", path=path, max_length=32)


@pytest.fixture(scope="module")
def teacher(task, encoder_folder, tmp_path_factory):
    """The report of a teacher that was made from a base model."""
    return makd.finetune(str(encoder_folder), task, RECIPE, tmp_path_factory.mktemp("runs") / "teacher")


def test_the_saved_tokenizer_is_the_model_s_without_the_truncation_of_training(teacher, encoder_folder):
    saved, own = ((folder / "tokenizer.json").read_text() for folder in (teacher.folder, encoder_folder))
    assert saved == own


def recipe(**settings):
    return makd.Recipe(
        **{"training": STEPS, **settings},
        calibration=makd.CalibrationConfig(rows=8),
        evaluation=makd.EvaluationConfig(rows=4, latency=False),
        device="cpu",
    )


def test_a_teacher_knows_its_labels_and_has_the_official_metrics(teacher):
    model = AutoModelForSequenceClassification.from_pretrained(teacher.folder)
    assert model.config.id2label == {0: "not_equivalent", 1: "equivalent"}
    metrics = json.loads((teacher.folder / "metrics.json").read_text())
    assert metrics["task"].keys() == {"name", "splits", "after"}
    assert metrics["task"]["splits"] == ["validation"]
    assert metrics["task"]["after"].keys() == {"accuracy", "f1", "score"}
    assert metrics["fingerprint"] == makd.fingerprint(model)
    assert metrics["tokens"]["training"] > 0
    assert {"recipe.yaml", "environment.json", "tokenizer.json"} <= {path.name for path in teacher.folder.iterdir()}


def test_the_same_seed_gives_the_same_teacher(teacher, task, encoder_folder, tmp_path):
    again = makd.finetune(str(encoder_folder), task, RECIPE, tmp_path / "again")
    assert again.metrics["fingerprint"] == teacher.metrics["fingerprint"]


def test_what_learned_in_bfloat16_is_measured_as_it_is_saved(task, encoder_folder, tmp_path, monkeypatch):
    logits = []
    measure = Task.evaluate

    def watch(self, model, *arguments):
        with torch.no_grad():
            logits.append(model(**model.dummy_inputs).logits)
        return measure(self, model, *arguments)

    monkeypatch.setattr(Task, "evaluate", watch)
    rounded = replace(RECIPE, training=replace(STEPS, precision="bfloat16"))
    folder = makd.finetune(str(encoder_folder), task, rounded, tmp_path / "teacher").folder
    saved = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert torch.equal(logits[0], saved(**saved.dummy_inputs).logits)


def test_a_run_that_was_stopped_resumes_to_the_same_teacher(task, encoder_folder, tmp_path, monkeypatch):
    from makd.distill import SupervisedTrainer

    long = makd.FinetuneRecipe(training=makd.TrainingConfig(steps=3, batch_size=4, save_every=1), device="cpu")
    whole = makd.finetune(str(encoder_folder), task, long, tmp_path / "whole")
    step = SupervisedTrainer.training_step

    def stop_at_the_third(self, *arguments, **named):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "training_step", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            makd.finetune(str(encoder_folder), task, long, tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    faster = replace(long, training=replace(long.training, learning_rate=1e-3))
    with pytest.raises(OutputError, match=r"not this one: training.learning_rate was 0.0001, is 0.001\. Give"):
        makd.finetune(str(encoder_folder), task, faster, tmp_path / "stopped", resume=True)
    with pytest.raises(OutputError, match="up to step 2"):
        makd.finetune(str(encoder_folder), task, long, tmp_path / "stopped")
    measured_otherwise = replace(long, evaluation_batch_size=1)
    resumed = makd.finetune(str(encoder_folder), task, measured_otherwise, tmp_path / "stopped", resume=True)
    assert resumed.metrics["fingerprint"] == whole.metrics["fingerprint"]


@pytest.fixture(scope="module")
def student(teacher, task, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "student"
    return makd.compress(str(teacher.folder), task, makd.Budget(keep_linears=0.5), recipe(), output)


def test_a_student_of_a_task_is_measured_beside_its_teacher(student, teacher):
    found = student.metrics["task"]
    assert found.keys() == {"name", "splits", "teacher", "before", "after"}
    assert found["teacher"] == teacher.metrics["task"]["after"]
    assert found["after"].keys() == {"accuracy", "f1", "score"}
    assert "glue/mrpc accuracy" in (student.folder / "README.md").read_text()


def rows_of_forwards(model):
    """Numbers of rows, as forwards of `model` come to have them."""
    found = []
    model.register_forward_pre_hook(lambda _, __, inputs: found.append(len(inputs["input_ids"])), with_kwargs=True)
    return found


def test_a_task_is_measured_in_batches_of_the_evaluations_size(teacher, task):
    model = load_model(str(teacher.folder))
    found = rows_of_forwards(model)
    few = replace(recipe(), evaluation=makd.EvaluationConfig(latency=False, batch_size=3, rows=3))
    pipeline.evaluate(str(teacher.folder), model, task, few, tokenizer=str(teacher.folder))
    assert len(PAIRS[:6]) == 6
    assert found.count(3) >= 3  # two of the task, one of the held-out rows
    assert max(found) == 3


def test_its_recipe_says_the_task_which_evaluation_takes(student, teacher, task):
    written = yaml.safe_load((student.folder / "recipe.yaml").read_text())
    assert written["task"]["name"] == "glue/mrpc"
    assert "data" not in written
    assert pipeline.data_of(str(student.folder)) == task
    found = makd.evaluate(str(student.folder), str(teacher.folder), task, recipe())
    assert found["task"]["after"] == pytest.approx(student.metrics["task"]["after"])


def test_a_student_is_fine_tuned_in_factored_form(encoder_folder, task, tmp_path):
    base = makd.factorize(tiny("bert", vocab_size=300), makd.Budget(keep_linears=0.5), solver="svd")
    base.save_pretrained(tmp_path / "base")
    report = makd.finetune(str(tmp_path / "base"), task, RECIPE, tmp_path / "tuned", tokenizer=str(encoder_folder))
    tuned = AutoModelForSequenceClassification.from_pretrained(report.folder)
    assert is_student(tuned)
    assert makd.fingerprint(tuned) == report.metrics["fingerprint"]


@pytest.fixture(scope="module")
def taught(task, encoder_folder, tmp_path_factory):
    """Folder of a student of a base model that was taught a task afterwards."""
    folder = tmp_path_factory.mktemp("taught")
    few, svd = makd.DataConfig(path="pydoc", rows=40, max_length=16), makd.FactorizeConfig(solver="svd")
    half = makd.Budget(keep_linears=0.5)
    made = pipeline.factorize_only(str(encoder_folder), few, half, recipe(factorize=svd), folder / "made")
    return makd.finetune(str(made.folder), task, RECIPE, folder / "tuned").folder


class TestAStudentThatIsTaughtATask:
    def test_is_made_faster_with_the_numbers_that_it_has(self, taught, teacher, tmp_path, monkeypatch):
        monkeypatch.setattr(measuring, "FOLD_FROM", 0.0)  # every linear counts as slower when it is factored
        student, faster = shutil.copytree(taught, tmp_path / "student"), tmp_path / "faster"
        quick = makd.BenchConfig(batches=(1,), lengths=(8,), repeats=1)
        makd.bench(str(student), str(teacher.folder), quick, fold=True, output=faster)
        model = load_model(str(faster))
        old, new = (json.loads((folder / "metrics.json").read_text()) for folder in (student, faster))
        assert new["params"] == {"total": sum(p.numel() for p in model.parameters())}
        assert new["params"]["total"] > old["params"]["total"]
        assert new["bytes"] == (faster / "model.safetensors").stat().st_size
        assert new["fingerprint"] == makd.fingerprint(model)
        assert new["task"] == old["task"]
        assert "## Speed" in (faster / "README.md").read_text()

    def test_is_not_offered_to_be_made_a_student_of(self, taught, teacher, task, tmp_path, run):
        quick = ["--task.max_length", "32", "--recipe.training.steps", "1", "--recipe.device", "cpu"]
        given = ["--task", task.name, "--task_data", task.path, "--output", tmp_path / "again"]
        code, out, err = run("finetune", taught, *given, *quick)
        assert code == 0, err
        lines = [shlex.split(line, comments=True) for line in out.partition("next:\n")[2].splitlines()]
        assert [line[1] for line in lines] == ["evaluate", "bench"]
        few = ["--recipe.evaluation.latency", "false", "--recipe.device", "cpu"]
        words = [str(teacher.folder) if word == "TEACHER" else word for word in lines[0][1:]]
        code, _, err = run(*words, *few)
        assert code == 0, err


def test_extra_text_is_distilled_on_besides(teacher, task, tmp_path):
    from dataclasses import replace

    extra = write(tmp_path / "extra", train=[{"text": "The names of a class"}] * 12)
    more = replace(task, extra_text=extra)
    every_row = recipe(training=makd.TrainingConfig(epochs=1.0, batch_size=2))
    report = makd.compress(str(teacher.folder), more, makd.Budget(keep_linears=0.5), every_row, tmp_path / "student")
    assert report.metrics["tokens"]["training"] > 12 * 5


def test_one_stage_is_what_plan_and_training_are(student, teacher, task, tmp_path):
    staged = recipe(training=makd.TrainingConfig(), stages=(makd.Stage(training=STEPS),))
    report = makd.compress(str(teacher.folder), task, makd.Budget(keep_linears=0.5), staged, tmp_path / "student")
    assert report.metrics["fingerprint"] == student.metrics["fingerprint"]


def test_stages_follow_each_other_and_resume_where_they_were(teacher, task, tmp_path, monkeypatch):
    from makd.distill import DistillTrainer

    saved = makd.TrainingConfig(steps=2, batch_size=4, save_every=1)
    inside = makd.Plan(terms=(makd.Term(aspect="matrix"), makd.Term(aspect="hidden")))
    staged = recipe(
        training=makd.TrainingConfig(), stages=(makd.Stage(plan=inside, training=saved), makd.Stage(training=saved))
    )
    budget, plans, train = makd.Budget(keep_linears=0.5), [], DistillTrainer.train

    def note(self, *arguments, **named):
        plans.append([active.name for active in self.plan.terms])
        return train(self, *arguments, **named)

    monkeypatch.setattr(DistillTrainer, "train", note)
    whole = makd.compress(str(teacher.folder), task, budget, staged, tmp_path / "whole")
    assert plans == [["matrix", "hidden"], ["matrix", "hidden", "attention", "logits", "task"]]
    step = DistillTrainer.training_step

    def stop_in_the_second(self, *arguments, **named):
        if len(self.plan.terms) > 2 and self.state.global_step == 1:
            raise KeyboardInterrupt
        return step(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(DistillTrainer, "training_step", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            makd.compress(str(teacher.folder), task, budget, staged, tmp_path / "stopped")
    resumed = makd.compress(str(teacher.folder), task, budget, staged, tmp_path / "stopped", resume=True)
    assert resumed.metrics["fingerprint"] == whole.metrics["fingerprint"]


@pytest.mark.parametrize("model", [["MODEL"], ["--teacher", "MODEL"]])
def test_the_command_line_has_short_flags(model, task, encoder_folder, tmp_path, capsys):
    words = [str(encoder_folder) if word == "MODEL" else word for word in model]
    code = main(
        ["finetune", *words, "--task", "glue/mrpc", "--task_data", task.path, "--task.max_length=32",
         "--recipe.training.steps", "1", "--recipe.device", "cpu", "--output", str(tmp_path / "teacher")]
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "accuracy" in out


def test_a_task_and_data_at_once_are_refused(capsys, task):
    words = ["compress", "--teacher", "x", "--output", "y", "--budget.keep", "0.5", "--data.path", "z.txt"]
    assert main([*words, "--task", "glue/mrpc", "--task_data", task.path]) == 2
    assert "not both" in capsys.readouterr().err


@pytest.mark.parametrize("setting", [{"teacher_dtype": "bfloat16"}, {"shard_teacher": True}])
def test_settings_of_distillation_are_refused(setting):
    with pytest.raises(SettingError, match=f"training.{next(iter(setting))} is of distillation"):
        makd.FinetuneRecipe(training=makd.TrainingConfig(**setting))


def test_text_without_labels_is_refused_where_only_labels_teach(task, tmp_path):
    with pytest.raises(SettingError, match=r"task.extra_text \(texts.txt\) has none. Leave it out here"):
        makd.finetune("anything", replace(task, extra_text="texts.txt"), output=tmp_path / "out")


def test_a_plan_or_a_training_beside_stages_is_refused():
    stage = makd.Stage(plan=makd.Plan(preset="logits"))
    with pytest.raises(SettingError, match=r"recipe\.plan and recipe\.training would do nothing beside them"):
        makd.Recipe(stages=(stage,), plan=makd.Plan(preset="fast"), training=STEPS)


def classifier_of_two_stacks(name, folder, tokenizer):
    """A model whose decoder ends at the tokenizer's own end of a text."""
    ends = {"eos_token_id": tokenizer.sep_token_id, "pad_token_id": tokenizer.pad_token_id}
    begin = {"decoder_start_token_id": tokenizer.sep_token_id, "num_labels": 2}
    model = tiny(name, "sequence_classification", vocab_size=len(tokenizer), **begin, **ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_classifier_of_two_stacks_gives_what_transformers_gives_without_makd(name, task, tokenizer, tmp_path):
    model = classifier_of_two_stacks(name, tmp_path / "base", tokenizer)
    rows = load_task(task, tokenizer, model)
    batch = collator(tokenizer, model)([dict(row) for row in rows.train])
    own = {key: value for key, value in batch.items() if not key.startswith("decoder_")}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, model(**own).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_classifier_of_two_stacks_is_taught_and_measured_to_the_end(name, task, tokenizer, tmp_path):
    classifier_of_two_stacks(name, tmp_path / "base", tokenizer)
    report = makd.finetune(str(tmp_path / "base"), task, RECIPE, tmp_path / "teacher")
    read = [len(ids) for ids in load_task(task, tokenizer, load_model(str(report.folder))).held_out["input_ids"]]
    assert report.metrics["tokens"]["evaluation"] == 2 * sum(read)  # the decoder reads the text, too
    timed = replace(recipe(), evaluation=makd.EvaluationConfig(rows=4))
    made = makd.compress(str(report.folder), task, makd.Budget(keep_linears=0.7), timed, tmp_path / "student")
    assert made.metrics["latency_ms"]["student"]["batch1"] > 0
