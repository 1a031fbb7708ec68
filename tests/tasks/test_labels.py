"""Which label is which: in the data, in the settings, and in a model's head."""

import logging

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, r2_score

from makd.comparison.setup import majority_score
from makd.errors import DataError, SettingError
from makd.tasks import TaskConfig, load_task, load_task_model, read_task
from makd.tasks.labels import sort_names
from tests.models import tiny
from tests.tasks.test_tasks import PAIRS, SIZES, classifier, config, write


def own(tmp_path, values, **settings):
    rows = [{"text": f"name {place} of a list", "label": label} for place, label in enumerate(values)]
    path = write(tmp_path / "own", train=rows, validation=rows)
    return TaskConfig(name="classification", path=path, max_length=32, **settings)


def knowing(names, task, tokenizer):
    """A model whose head says, in the order of `names`, what the data say of each text."""
    names = list(names)
    model = classifier([f"LABEL_{place}" for place in range(len(names))])
    answers = {}
    rows = read_task(task)
    for row in rows.evaluation["validation"]:
        ids = tokenizer(row["text"])["input_ids"]
        answers[tuple(ids)] = names.index(rows.labels[row["label"]])

    def answer(_model, _arguments, inputs, output):
        for line, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            output.logits[line] = 0.0
            output.logits[line, answers[tuple(ids[mask.bool()].tolist())]] = 1.0
        return output

    model.register_forward_hook(answer, with_kwargs=True)
    return model


def call(model, names):
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {}
    return model


class TestOrderOfNames:
    def test_numbers_in_words_are_sorted_by_number(self, tmp_path):
        labels = [str(number) for number in range(12)]
        assert read_task(own(tmp_path, labels)).labels == tuple(labels)

    @pytest.mark.parametrize(
        ("names", "order"),
        [
            (["10", "9", "-1", "0"], ["-1", "0", "9", "10"]),
            (["LABEL_10", "LABEL_2"], ["LABEL_2", "LABEL_10"]),
            (["b", "a", "10"], ["10", "a", "b"]),
        ],
    )
    def test_of_other_names(self, names, order):
        assert sort_names(names) == order

    def test_a_model_that_knows_twelve_numbered_classes_is_right_everywhere(self, tmp_path, tokenizer):
        labels = [str(number) for number in range(12)]
        task = own(tmp_path, labels)
        model = knowing(labels, task, tokenizer)
        assert load_task(task, tokenizer, model).evaluate(model)["accuracy"] == 1.0

    def test_a_model_of_the_order_of_text_is_matched_by_name(self, tmp_path, tokenizer):
        labels = [str(number) for number in range(12)]
        task = own(tmp_path, labels)
        model = call(knowing(sorted(labels), task, tokenizer), sorted(labels))
        assert load_task(task, tokenizer, model).evaluate(model)["accuracy"] == 1.0


class TestNumbersOfClasses:
    @pytest.mark.parametrize("labels", [[1, 10**9], [94105, 94110, 2134], [1, 2, 10], [-5, -3]])
    def test_that_are_codes_or_ids_are_refused_before_a_head_is_made_of_them(self, tmp_path, labels):
        with pytest.raises(
            DataError, match=f"from 0, without gaps.*different ones, from {min(labels)} to {max(labels)}"
        ):
            read_task(own(tmp_path, labels * 3))

    def test_may_lack_some_and_which_is_told(self, tmp_path, caplog):
        task = own(tmp_path, [1, 2, 3] * 2)
        with caplog.at_level(logging.WARNING, logger="makd"):
            assert read_task(task).labels == ("0", "1", "2", "3")
        assert "has the label 0" in caplog.text
        assert "if there is no such class, number the others from 0" in caplog.text

    def test_that_are_texts_are_names(self, tmp_path):
        assert read_task(own(tmp_path, ["94105", "2134"] * 3)).labels == ("2134", "94105")


def test_classes_whose_names_differ_in_blanks_alone_are_told(tmp_path, caplog):
    task = own(tmp_path, [" yes", "yes", "no"] * 2)
    with caplog.at_level(logging.WARNING, logger="makd"):
        assert read_task(task).labels == (" yes", "no", "yes")
    assert "has ' yes' and 'yes' for classes of their own: they differ in blanks alone" in caplog.text


class TestAHeadOfAnotherOrder:
    TURNED = ("equivalent", "not_equivalent")

    @pytest.fixture
    def mrpc(self, tmp_path):
        return write(tmp_path / "mrpc", train=PAIRS, validation=PAIRS[:5])

    def pair(self):
        """The same model twice, with the outputs of the second one's head turned."""
        one, other = classifier(), classifier(self.TURNED)
        for mine, theirs in zip(one.classifier.parameters(), other.classifier.parameters(), strict=True):
            theirs.data = mine.data[[1, 0]].clone()
        return one, other

    def test_is_matched_by_name_and_said(self, mrpc, tokenizer, caplog):
        one, other = self.pair()
        tasks = [load_task(config(mrpc), tokenizer, model) for model in (one, other)]
        assert "matched by name" in caplog.text
        assert tasks[1].labels == self.TURNED
        assert [1 - label for label in tasks[0].train["label"]] == list(tasks[1].train["label"])
        batch = dict(tokenizer("The list", "a name", return_tensors="pt"), labels=torch.tensor([1]))
        turned = {**batch, "labels": torch.tensor([0])}
        torch.testing.assert_close(one(**batch).loss, other(**turned).loss)

    def test_has_the_same_metrics_though_f1_is_of_one_class(self, mrpc, tokenizer):
        one, other = self.pair()
        found = [load_task(config(mrpc), tokenizer, model).evaluate(model) for model in (one, other)]
        assert found[0] == found[1]

    def test_is_beside_the_same_majority(self, tmp_path, tokenizer):
        rows = [{**row, "label": int(place % 3 > 0)} for place, row in enumerate(PAIRS)]
        path = write(tmp_path / "uneven", train=rows, validation=rows[:5])
        found = [majority_score(load_task(config(path), tokenizer, model)) for model in self.pair()]
        true = [row["label"] for row in rows[:5]]
        assert found == [pytest.approx((np.mean(true) + f1_score(true, [1] * 5)) / 2)] * 2

    def test_that_does_not_say_is_told_by_the_settings(self, mrpc, tokenizer, caplog):
        one, other = self.pair()
        other.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
        asked = load_task(config(mrpc, labels=self.TURNED), tokenizer, other)
        assert asked.evaluate(other) == load_task(config(mrpc), tokenizer, one).evaluate(one)
        assert "LABEL_0" not in caplog.text
        load_task(config(mrpc), tokenizer, other)
        assert "LABEL_0 = not_equivalent, LABEL_1 = equivalent" in caplog.text

    def test_that_contradicts_the_settings_is_refused(self, mrpc, tokenizer):
        with pytest.raises(SettingError, match=r"Leave task\.labels out"):
            load_task(config(mrpc, labels=self.TURNED), tokenizer, classifier())

    def test_numbers_of_classes_are_what_a_model_without_names_calls_them(self, tmp_path, tokenizer, caplog):
        task = own(tmp_path, [0, 1, 2] * 2)
        with caplog.at_level(logging.WARNING, logger="makd"):  # whatever level an earlier test left it at
            load_task(task, tokenizer, classifier(("LABEL_0", "LABEL_1", "LABEL_2")))
        assert "LABEL_0" not in caplog.text

    def test_that_learns_on_keeps_its_order(self, mrpc, tokenizer, tmp_path):
        _, other = self.pair()
        other.save_pretrained(tmp_path / "other")
        again = load_task_model(str(tmp_path / "other"), read_task(config(mrpc)), tokenizer)
        assert again.config.id2label == dict(enumerate(self.TURNED))

    @pytest.mark.parametrize("names", [("us", "US"), ("US", "us")])
    def test_names_that_differ_in_case_alone_are_matched_as_they_are_written(self, tmp_path, tokenizer, names):
        task = own(tmp_path, ["us", "US", "US"] * 2)
        model = call(knowing(names, task, tokenizer), names)
        found = load_task(task, tokenizer, model)
        assert found.labels == names
        assert found.evaluate(model)["accuracy"] == 1.0

    def test_names_of_another_case_are_those_of_the_data_only_where_each_is_of_one(self, tmp_path, tokenizer):
        same = load_task(own(tmp_path, ["yes", "no"] * 2), tokenizer, classifier(("YES", "No ")))
        assert same.labels == ("yes", "no")
        with pytest.raises(SettingError, match="has the labels US, Us"):
            load_task(own(tmp_path, ["us", "US"] * 2), tokenizer, classifier(("US", "Us")))

    def test_that_is_new_has_the_order_of_the_settings(self, mrpc, tokenizer, encoder_folder):
        rows = read_task(config(mrpc, labels=self.TURNED))
        model = load_task_model(str(encoder_folder), rows, tokenizer)
        assert model.config.id2label == dict(enumerate(self.TURNED))


def test_a_split_whose_names_stand_in_another_order_is_read_by_name(tmp_path):
    (tmp_path / "data").mkdir()
    for split, names in (("train", ["not_equivalent", "equivalent"]), ("validation", ["equivalent", "not_equivalent"])):
        features = Features(sentence1=Value("string"), sentence2=Value("string"), label=ClassLabel(names=names))
        rows = [{**row, "label": names.index(("not_equivalent", "equivalent")[row["label"]])} for row in PAIRS]
        path = tmp_path / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(rows, features=features).to_parquet(path)
    # one feature for all splits is what `datasets` would take from a folder
    for split in ("train", "validation"):
        single = config(str(tmp_path / "data" / f"{split}-00000-of-00001.parquet"), evaluation_splits=("train",))
        found = read_task(single)
        assert found.labels == ("not_equivalent", "equivalent")
        assert found.evaluation["train"]["label"] == [row["label"] for row in PAIRS]


class TestMinusOne:
    def test_is_refused_where_it_may_be_a_class(self, tmp_path):
        with pytest.raises(DataError, match="-1, 0, 1: -1 may be a class"):
            read_task(own(tmp_path, [-1, 0, 1] * 2))

    def test_is_refused_where_it_seems_to_be_one_of_the_names(self, tmp_path):
        with pytest.raises(DataError, match="-1 seems to be a class"):
            read_task(own(tmp_path, [-1, 0, 1] * 2, labels=("bad", "fair", "good")))

    def test_is_no_label_where_the_names_are_of_the_others(self, tmp_path, caplog):
        task = own(tmp_path, [-1, 0, 1] * 4, labels=("bad", "good"), evaluation_splits=("held_out",), held_out=0.5)
        caplog.set_level(logging.WARNING)
        rows = read_task(task)
        assert len(rows.train) + len(rows.evaluation["held_out"]) == 8
        assert "have no label" in caplog.text

    def test_as_a_name_is_a_class_like_any_other(self, tmp_path):
        assert read_task(own(tmp_path, ["-1", "0", "1"] * 2)).labels == ("-1", "0", "1")


class TestNumbers:
    def task(self, tmp_path, values, **settings):
        rows = [{"text": f"name {place} of a list", "label": value} for place, value in enumerate(values)]
        path = write(tmp_path / "numbers", train=rows, validation=rows)
        return TaskConfig(name="regression", path=path, max_length=32, **settings)

    def test_may_be_several_a_row(self, tmp_path, tokenizer):
        values = np.random.default_rng(0).normal(size=(8, 3)).round(3)
        task = self.task(tmp_path, values.tolist(), metrics=("pearson", "spearman", "r2"))
        model = tiny("bert", "sequence_classification", **SIZES, num_labels=3, problem_type="regression")
        found = load_task(task, tokenizer, model).evaluate(model)
        rows = [model(**tokenizer(f"name {place} of a list", return_tensors="pt")).logits[0] for place in range(8)]
        predicted = torch.stack(rows).detach().numpy()
        pairs = [(predicted[:, column], values[:, column]) for column in range(3)]
        assert found["pearson"] == pytest.approx(np.mean([pearsonr(*pair).statistic for pair in pairs]), abs=1e-5)
        assert found["spearman"] == pytest.approx(np.mean([spearmanr(*pair).statistic for pair in pairs]), abs=1e-5)
        assert found["r2"] == pytest.approx(r2_score(values, predicted), rel=1e-4)

    def test_a_new_head_has_an_output_for_each(self, tmp_path, tokenizer, encoder_folder):
        rows = read_task(self.task(tmp_path, [[0.5, 1.5], [1.0, 2.0]] * 3))
        model = load_task_model(str(encoder_folder), rows, tokenizer)
        assert (model.config.num_labels, model.config.problem_type) == (2, "regression")

    @pytest.mark.parametrize(
        ("values", "text"),
        [([[1.0, 2.0], [1.0]] * 3, "has 2 numbers as labels; one has"), ([1.0, float("inf")] * 3, "infinite label")],
    )
    def test_that_are_not_like_each_other_or_infinite_are_refused(self, tmp_path, values, text):
        with pytest.raises(DataError, match=text):
            read_task(self.task(tmp_path, values))
