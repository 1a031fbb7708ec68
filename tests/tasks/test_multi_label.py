"""Tasks of several labels a row: three ways to write them, one meaning, and scikit-learn's metrics."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from sklearn.metrics import accuracy_score, f1_score

import makd
from makd.errors import DataError, SettingError
from makd.tasks import TaskConfig, check_head, load_task, load_task_model, read_task
from tests.models import tiny
from tests.tasks.test_tasks import SIZES, write

NAMES = ("angry", "glad", "sad")
SETS = [[0], [1, 2], [], [2], [0, 1, 2], [1]]
TEXTS = [f"The list {place} is a name" for place in range(12)]
FORMS = {
    "names": [[NAMES[label] for label in labels] for labels in SETS],
    "numbers": SETS,
    "a 0 or 1 for each": [[int(label in labels) for label in range(3)] for labels in SETS],
    "true or false for each": [[label in labels for label in range(3)] for labels in SETS],
}


def data(tmp_path, values, name="moods"):
    rows = [{"text": text, "labels": values[place % len(values)]} for place, text in enumerate(TEXTS)]
    return write(tmp_path / name, train=rows, validation=rows[:6])


def config(path, **settings):
    return TaskConfig(name="multi_label", path=path, max_length=32, **settings)


def model(names=NAMES, seed=0, **settings):
    settings = {"id2label": dict(enumerate(names)), "label2id": {}, **settings}
    kind = settings.pop("problem_type", "multi_label_classification")
    return tiny("bert", "sequence_classification", seed=seed, **SIZES, **settings, problem_type=kind)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("labels", [NAMES, None])
def test_labels_may_be_written_in_several_ways(form, labels, tmp_path):
    rows = read_task(config(data(tmp_path, FORMS[form]), labels=labels))
    assert rows.labels == (labels or (NAMES if form == "names" else ("0", "1", "2")))
    wanted = [[float(label in labels) for label in range(3)] for labels in SETS]
    assert [list(row) for row in rows.evaluation["validation"]["label"]] == wanted


def test_names_of_the_data_are_kept(tmp_path):
    features = Features(text=Value("string"), labels=List(ClassLabel(names=list(NAMES))))
    rows = Dataset.from_dict({"text": TEXTS[:6], "labels": SETS}, features=features)
    (tmp_path / "moods").mkdir()
    rows.to_parquet(tmp_path / "moods" / "train.parquet")
    found = read_task(config(str(tmp_path / "moods"), held_out=0.5))
    assert found.labels == NAMES


def test_metrics_are_scikit_learns_of_forwards_one_row_at_a_time(tmp_path, tokenizer):
    learner = model()
    learner.classifier.weight.data *= 3
    task = load_task(config(data(tmp_path, SETS), labels=NAMES), tokenizer, learner)
    predicted = []
    for text in TEXTS[:6]:
        logits = learner(**tokenizer(text, return_tensors="pt")).logits[0]
        predicted.append((logits.sigmoid() > 0.5).int().tolist())
    true = np.array([[int(label in labels) for label in range(3)] for labels in SETS])
    found = task.evaluate(learner, batch_size=4)
    expected = {
        "micro_f1": f1_score(true, predicted, average="micro", zero_division=0),
        "macro_f1": f1_score(true, predicted, average="macro", zero_division=0),
        "subset_accuracy": accuracy_score(true, predicted),
    }
    assert found == pytest.approx({**expected, "score": sum(expected.values()) / 3})
    assert found["micro_f1"] > 0


def test_a_head_in_another_order_is_matched_by_name(tmp_path, tokenizer):
    straight, turned = model(), model(("sad", "angry", "glad"))
    turned.classifier.weight.data = straight.classifier.weight.data[[2, 0, 1]].clone()
    turned.classifier.bias.data = straight.classifier.bias.data[[2, 0, 1]].clone()
    path = data(tmp_path, FORMS["names"])
    tasks = [load_task(config(path), tokenizer, learner) for learner in (straight, turned)]
    assert tasks[0].evaluate(straight) == tasks[1].evaluate(turned)
    one, other = (torch.tensor(list(task.held_out["label"])) for task in tasks)
    assert torch.equal(one[:, [2, 0, 1]], other)


def test_extra_text_has_labels_that_no_loss_looks_at(tmp_path, tokenizer):
    extra = write(tmp_path / "extra", train=[{"text": "The names of a class"}] * 3)
    task = load_task(config(data(tmp_path, FORMS["names"]), extra_text=extra), tokenizer, model())
    assert np.isnan(np.array(list(task.extra["label"]))).all()
    assert len(task.distillation) == 15


class TestHeads:
    def test_a_new_head_says_that_it_has_several_labels(self, tmp_path, tokenizer, encoder_folder):
        rows = read_task(config(data(tmp_path, FORMS["names"])))
        learner = load_task_model(str(encoder_folder), rows, tokenizer)
        assert learner.config.problem_type == "multi_label_classification"
        assert learner.config.id2label == dict(enumerate(NAMES))
        assert check_head(learner, rows.config, rows.labels) == (0, 1, 2)

    def test_a_head_of_one_class_a_row_is_refused_for_several_and_the_other_way_round(self, tmp_path):
        task = config(data(tmp_path, SETS))
        with pytest.raises(SettingError, match=r"has labels to predict; .* predicts classes of each row"):
            check_head(model(problem_type="single_label_classification"), task, NAMES)
        one = TaskConfig(name="classification", path=task.path)
        with pytest.raises(SettingError, match=r"has classes to predict; .* predicts labels of each row"):
            check_head(model(), one, NAMES)


@pytest.mark.parametrize(
    ("values", "settings", "text"),
    [
        ([[0], [3]], {"labels": NAMES}, "the label 3; the task's 3 labels are angry"),
        ([["angry"], ["mad"]], {"labels": NAMES}, "the label 'mad'"),
        ([[0, 1], [1, 1]], {"labels": NAMES}, "not a 0 or 1 for each of the task's 3 labels"),
        ([[0.5, 1.0], [0.25, 0.0]], {}, "Is it a regression"),
        ([1, 2], {}, "One label a row is a 'classification'"),
        ([[-1], [2]], {}, "may be a class"),
        ([[[1, 0]], [[1]]], {}, "these hold"),
        ([["glad"], ["glad"]], {}, "nothing to tell apart"),
    ],
)
def test_labels_of_another_form_are_refused(tmp_path, values, settings, text):
    with pytest.raises(DataError, match=text):
        read_task(config(data(tmp_path, values), **settings))


def test_a_classification_says_that_several_labels_are_another_kind(tmp_path):
    path = data(tmp_path, FORMS["names"])
    with pytest.raises(DataError, match="'multi_label'"):
        read_task(TaskConfig(name="classification", path=path, label_column="labels"))


def test_a_teacher_and_its_student_are_made_and_measured(tmp_path, encoder_folder):
    steps = makd.TrainingConfig(steps=2, batch_size=4)
    task = config(data(tmp_path, FORMS["names"]))
    teacher = makd.finetune(
        str(encoder_folder), task, makd.FinetuneRecipe(training=steps, device="cpu"), tmp_path / "teacher"
    )
    recipe = makd.Recipe(
        training=steps, calibration=makd.CalibrationConfig(rows=8),
        evaluation=makd.EvaluationConfig(rows=6, latency=False), device="cpu",
    )  # fmt: skip
    budget = makd.Budget(keep_linears=0.5)
    report = makd.compress(str(teacher.folder), task, budget, recipe, tmp_path / "student")
    assert report.metrics["task"]["after"].keys() == {"micro_f1", "macro_f1", "subset_accuracy", "score"}
    assert report.metrics["task"]["teacher"] == teacher.metrics["task"]["after"]
    assert report.metrics["fidelity"]["after"].keys() == {"prediction_kl", "label_agreement", "label_set_agreement"}
    saved = json.loads((tmp_path / "student" / "config.json").read_text())
    assert saved["problem_type"] == "multi_label_classification"
    again = makd.evaluate(str(report.folder), str(teacher.folder), task, recipe)
    assert again["task"]["after"] == report.metrics["task"]["after"]
