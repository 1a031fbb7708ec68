"""Tasks from files: what a user may name, what comes out, and a clear early error for every wrong input."""

import json
import os
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from makd.data import collator
from makd.errors import DataError, SettingError, UnknownNameError
from makd.tasks import TASKS, TaskConfig, check_head, load_task, load_task_model, read_task, tokenize_task
from tests.models import tiny

SIZES = {"vocab_size": 300, "max_position_embeddings": 64}
PAIRS = [
    {"sentence1": f"The list {place} is", "sentence2": f"a list of {place} names", "label": place % 2}
    for place in range(12)
]


def write(folder, **splits):
    folder.mkdir(exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.fixture
def mrpc(tmp_path):
    return write(tmp_path / "mrpc", train=PAIRS, validation=PAIRS[:5])


def classifier(labels=("not_equivalent", "equivalent"), **changes):
    names = dict(enumerate(labels))
    return tiny("bert", "sequence_classification", **SIZES, id2label=names, label2id={}, **changes)


def config(path, name="glue/mrpc", **settings):
    return TaskConfig(name=name, path=path, max_length=32, **settings)


class TestClassification:
    def test_a_pair_task_is_tokenized_with_both_texts_and_measured_officially(self, mrpc, tokenizer):
        task = load_task(config(mrpc), tokenizer, classifier())
        assert (len(task.train), len(task.held_out)) == (12, 5)
        assert task.labels == ("not_equivalent", "equivalent")
        assert task.train[0]["input_ids"].count(tokenizer.sep_token_id) == 2
        assert task.evaluate(classifier()).keys() == {"accuracy", "f1", "score"}

    def test_the_metrics_are_those_of_forwards_one_row_at_a_time(self, mrpc, tokenizer):
        model = classifier()
        task = load_task(config(mrpc), tokenizer, model)
        right = 0
        for row in PAIRS[:5]:
            inputs = tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")
            right += int(model(**inputs).logits.argmax()) == row["label"]
        assert task.evaluate(model, batch_size=4)["accuracy"] == pytest.approx(right / 5)

    def test_rows_are_as_long_as_they_are_until_they_are_in_a_batch(self, mrpc, tokenizer):
        task = load_task(config(mrpc), tokenizer, classifier())
        lengths = [len(ids) for ids in task.train["input_ids"]]
        batch = collator(tokenizer, classifier())([task.train[place] for place in range(3)])
        assert batch["input_ids"].shape == (3, max(lengths[:3]))
        assert max(lengths) < 32

    def test_mnli_is_measured_on_matched_and_mismatched_rows(self, tmp_path, tokenizer):
        rows = [{"premise": "The list", "hypothesis": f"a name {place}", "label": place % 3} for place in range(6)]
        for name in ("train", "validation_matched", "validation_mismatched"):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        import datasets

        names = ("train", "validation_matched", "validation_mismatched")
        splits = datasets.DatasetDict({name: Dataset.from_list(rows) for name in names})
        folder = tmp_path / "mnli"
        for name, split in splits.items():
            (folder / "data").mkdir(parents=True, exist_ok=True)
            split.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
        model = classifier(TASKS["glue/mnli"].labels)
        found = load_task(config(str(folder), "glue/mnli"), tokenizer, model).evaluate(model)
        assert found.keys() == {"accuracy_matched", "accuracy_mismatched", "score"}

    def test_labels_may_be_words_whose_order_is_kept_in_the_model(self, tmp_path, tokenizer, encoder_folder):
        rows = [{"text": f"name {place}", "kind": "spam" if place % 2 else "ham"} for place in range(12)]
        task = config(write(tmp_path / "own", train=rows), "classification", label_column="kind")
        found = read_task(task)
        assert found.labels == ("ham", "spam")
        assert len(found.evaluation["held_out"]) == 1  # 0.1 of 12
        model = load_task_model(str(encoder_folder), found, tokenizer)
        assert model.config.id2label == {0: "ham", 1: "spam"}
        check_head(model, task, found.labels)

    def test_training_rows_may_be_measured_on_though_there_are_validation_rows(self, tmp_path):
        data = write(tmp_path / "both", train=PAIRS, validation=PAIRS[:6])
        rows = read_task(config(data, evaluation_splits=("held_out",), held_out=0.25))
        assert rows.evaluation.keys() == {"held_out"}
        held_out, texts = rows.evaluation["held_out"]["text"], [row["sentence1"] for row in PAIRS]
        assert len(rows.train) + len(held_out) == 12
        assert sorted([*rows.train["text"], *held_out]) == sorted(texts)
        assert read_task(rows.config).evaluation["held_out"]["text"] == held_out

    def test_a_class_whose_rows_are_all_held_out_is_one_and_is_told(self, tmp_path, caplog):
        def read(label):
            rows = [{"text": f"text {place}", "label": label(f"text {place}", place)} for place in range(20)]
            return read_task(config(write(tmp_path / "rare", train=rows), "classification", held_out=0.3))

        held_out = set(read(lambda _, place: "ab"[place % 2]).evaluation["held_out"]["text"])
        assert "has the label" not in caplog.text
        found = read(lambda text, place: "rare" if text in held_out else "ab"[place % 2])
        assert found.labels == ("a", "b", "rare")
        assert {found.labels[label] for label in found.train["label"]} == {"a", "b"}
        assert "that are trained on has the label rare: it is not learned" in caplog.text

    def test_a_class_that_nothing_is_learned_of_or_measured_on_is_told(self, tmp_path, caplog):
        rows = [{"text": f"text {place}", "label": "abc"[place // 20]} for place in range(60)]
        path = write(tmp_path / "sorted", train=rows, validation=rows[10:30])
        read_task(config(path, "classification", rows=40, labels=("a", "b", "c")))
        assert "None of the 40 rows of" in caplog.text
        assert "trained on has the label c: it is not learned" in caplog.text
        assert "None of the 20 rows of split 'validation'" in caplog.text
        assert "has the label c: it is not measured" in caplog.text

    def test_a_split_that_is_called_so_is_one(self, tmp_path):
        (tmp_path / "data").mkdir()
        for name, rows in (("train", PAIRS), ("held_out", PAIRS[:6])):
            Dataset.from_list(rows).to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
        found = read_task(config(str(tmp_path), evaluation_splits=("held_out",)))
        assert (len(found.train), len(found.evaluation["held_out"])) == (12, 6)

    def test_csv_with_columns_of_ones_own(self, tmp_path):
        rows = "".join(f"one {number},two,1\none {number},,0\n" for number in range(6))
        (tmp_path / "own.csv").write_text(f"question,answer,right\n{rows}")
        task = config(
            str(tmp_path / "own.csv"), "classification", text_columns=("question", "answer"), label_column="right"
        )
        rows = read_task(task)
        assert rows.train.column_names == ["text", "text_pair", "label"]
        assert rows.labels == ("0", "1")

    def test_rows_without_a_label_are_left_out_of_training(self, tmp_path):
        train = [*PAIRS, {**PAIRS[0], "label": -1}]
        assert len(read_task(config(write(tmp_path / "some", train=train, validation=PAIRS))).train) == 12

    @pytest.mark.parametrize("labels", [None, ("bad", "good")])
    def test_a_csv_file_whose_labels_are_missing_here_and_there_is_a_task_of_the_rows_that_have_one(
        self, tmp_path, labels
    ):
        (tmp_path / "reviews.csv").write_text("number,text,label\n" + "1,a film,1\n2,a film,\n3,a film,0\n" * 6)
        rows = read_task(config(str(tmp_path / "reviews.csv"), "classification", labels=labels))
        assert rows.labels == (labels or ("0", "1"))
        found = [*rows.train["label"], *rows.evaluation["held_out"]["label"]]
        assert sorted(found) == [0] * 6 + [1] * 6

    def test_labels_that_are_not_a_number_are_missing(self, tmp_path):
        rows = [{"text": f"film {place}", "label": float(place % 2)} for place in range(6)]
        Dataset.from_list([*rows, {"text": "film", "label": float("nan")}]).to_parquet(tmp_path / "rows.parquet")
        found = read_task(config(str(tmp_path / "rows.parquet"), "classification"))
        assert (found.labels, len(found.train) + len(found.evaluation["held_out"])) == (("0", "1"), 6)


class TestHeads:
    def test_a_base_model_gets_a_head_that_its_seed_decides(self, mrpc, tokenizer, encoder_folder):
        rows = read_task(config(mrpc))
        one, same, other = (load_task_model(str(encoder_folder), rows, tokenizer, seed) for seed in (0, 0, 1))
        assert torch.equal(one.classifier.weight, same.classifier.weight)
        assert not torch.equal(one.classifier.weight, other.classifier.weight)

    def test_a_head_for_another_number_of_labels_is_replaced(self, mrpc, tokenizer, tmp_path):
        classifier(("a", "b", "c")).save_pretrained(tmp_path / "three")
        model = load_task_model(str(tmp_path / "three"), read_task(config(mrpc)), tokenizer)
        assert model.classifier.out_features == 2

    def test_a_teacher_has_to_have_the_tasks_labels(self, mrpc):
        task, labels = config(mrpc), ("not_equivalent", "equivalent")
        assert check_head(classifier(), task, labels) == (0, 1)
        with pytest.raises(SettingError, match="has the labels good, bad; the task glue/mrpc has not_equivalent"):
            check_head(classifier(("good", "bad")), task, labels)
        with pytest.raises(SettingError, match="predicts 3 labels; the task glue/mrpc has 2"):
            check_head(classifier(("a", "b", "c")), task, labels)
        with pytest.raises(SettingError, match="makd finetune"):
            check_head(tiny("bert", **SIZES), task, labels)

    def test_a_decoder_cannot_mark_places(self, tmp_path, tokenizer, decoder_folder):
        task = TaskConfig(name="squad", path=squad(tmp_path), max_length=32, stride=8)
        with pytest.raises(SettingError, match="decoder"):
            load_task_model(str(decoder_folder), read_task(task), tokenizer)
        with pytest.raises(SettingError, match="decoder"):
            check_head(tiny("llama", "causal_lm", **SIZES), task, ())


def squad(tmp_path):
    context = "The list of names is long . " * 8 + "A class has names ."
    rows = [
        {"id": "0", "question": "What has names?", "context": context,
         "answers": {"text": ["A class"], "answer_start": [context.index("A class")]}},
        {"id": "1", "question": "Who?", "context": "Nobody is a name.", "answers": {"text": [], "answer_start": []}},
    ]  # fmt: skip
    features = Features(
        id=Value("string"), question=Value("string"), context=Value("string"),
        answers={"text": List(Value("string")), "answer_start": List(Value("int32"))},
    )  # fmt: skip
    (tmp_path / "squad").mkdir()
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "squad" / f"{split}.parquet")
    return str(tmp_path / "squad")


def asked(question, answer="A class"):
    """A row of SQuAD's; "" is no answer."""
    answers = {"text": [answer], "answer_start": [0]} if answer else {"text": [], "answer_start": []}
    return {"question": question, "context": "A class has names .", "answers": answers}


class TestQuestionAnswering:
    def test_held_out_training_questions_are_measured_with_their_answers(self, tmp_path, tokenizer):
        model = tiny("bert", "question_answering", **SIZES)
        split = {"evaluation_splits": ("held_out",), "held_out": 0.5}
        rows = [asked(f"What has {number} names?") for number in range(12)]
        path = write(tmp_path / "questions", train=rows)
        loaded = load_task(TaskConfig(name="squad", path=path, max_length=40, stride=8, **split), tokenizer, model)
        assert 0 < len(loaded.references["held_out"]) < 12
        assert {"f1", "exact_match", "score"} <= loaded.evaluate(model).keys()

    def test_answers_are_found_again_in_the_window_that_holds_them(self, tmp_path, tokenizer):
        model = tiny("bert", "question_answering", **SIZES)
        task = load_task(TaskConfig(name="squad_v2", path=squad(tmp_path), max_length=40, stride=8), tokenizer, model)
        windows = task.evaluation["validation"]
        assert len(windows) > 3  # the long context takes several
        context = task.references["validation"]["context"][0]
        marked = [row for row in windows if row["end_positions"] > 0]
        assert marked
        for row in marked:
            first, last = row["offsets"][row["start_positions"]][0], row["offsets"][row["end_positions"]][1]
            assert context[first:last] == "A class"
        assert {row["question"] for row in marked} == {0}
        assert task.evaluate(model).keys() == {"f1", "exact_match", "answerable_f1", "unanswerable_f1", "score"}

    def test_a_model_that_knows_the_places_scores_one(self, tmp_path, tokenizer):
        model = tiny("bert", "question_answering", **SIZES)
        task = load_task(TaskConfig(name="squad_v2", path=squad(tmp_path), max_length=40, stride=8), tokenizer, model)
        rows = task.evaluation["validation"]
        known = {tuple(row["input_ids"]): (row["start_positions"], row["end_positions"]) for row in rows}

        def answer(_model, _arguments, inputs, output):
            for line, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
                start, end = known[tuple(ids[mask.bool()].tolist())]
                output.start_logits[line], output.end_logits[line] = 0.0, 0.0
                output.start_logits[line, start], output.end_logits[line, end] = 9.0, 9.0
            return output

        model.register_forward_hook(answer, with_kwargs=True)
        assert task.evaluate(model) == dict.fromkeys(
            ("f1", "exact_match", "answerable_f1", "unanswerable_f1", "score"), 1.0
        )

    @pytest.mark.parametrize("name", ["question_answering", "squad", "squad_v2"])
    def test_that_a_question_has_no_answer_is_learned_and_predicted_whatever_the_task_is_called(
        self, tmp_path, tokenizer, name, caplog
    ):
        caplog.set_level("INFO", logger="makd")
        model = tiny("bert", "question_answering", **SIZES)
        model.register_forward_hook(says_nothing, with_kwargs=True)
        rows = [asked("Who?"), asked("Why?", ""), asked("What?", "")]
        path = write(tmp_path / "questions", train=[asked("What has names?")], validation=rows)
        found = load_task(TaskConfig(name=name, path=path, max_length=40, stride=8), tokenizer, model).evaluate(model)
        assert found["f1"] == found["exact_match"] == pytest.approx(2 / 3)
        assert "2 of 4 questions" in caplog.text

    def test_an_answer_is_predicted_of_squad_v2_too_where_all_questions_have_one(self, tmp_path, tokenizer):
        model = tiny("bert", "question_answering", **SIZES)
        model.register_forward_hook(says_nothing, with_kwargs=True)
        rows = [asked("Who?"), asked("What?")]
        path = write(tmp_path / "questions", train=rows, validation=rows)
        task = load_task(TaskConfig(name="squad_v2", path=path, max_length=40, stride=8), tokenizer, model)
        assert not task.may_be_none
        assert task.evaluate(model).keys() == {"f1", "exact_match", "answerable_f1", "score"}  # of none there is no F1

    def test_metrics_that_no_question_is_counted_by_are_refused(self, tmp_path):
        path = write(tmp_path / "questions", train=[asked("Why?", ""), asked("Who?")], validation=[asked("What?")])
        with pytest.raises(DataError, match=r"nothing to measure by .*unanswerable_f1.* of split 'validation'"):
            read_task(TaskConfig(name="squad_v2", path=path, metrics=("unanswerable_f1",)))


def says_nothing(_model, _arguments, _inputs, output):
    """The first token, [CLS], is by far the likeliest place."""
    output.start_logits[:, 0] = output.end_logits[:, 0] = 99.0
    return output


class TestTokenClassification:
    NAMES = ("O", "B-PER", "I-PER")

    def tagged(self, tmp_path, names=NAMES):
        features = Features(tokens=List(Value("string")), ner_tags=List(ClassLabel(names=list(names))))
        rows = [{"tokens": ["The", "documentation", "of", "Guido"], "ner_tags": [0, 0, 0, 1]}] * 4
        (tmp_path / "ner").mkdir()
        for split in ("train", "validation"):
            Dataset.from_list(rows, features=features).to_parquet(tmp_path / "ner" / f"{split}.parquet")
        return TaskConfig(name="token_classification", path=str(tmp_path / "ner"), max_length=32)

    def test_a_words_first_piece_has_its_tag_and_padding_has_none(self, tmp_path, tokenizer):
        names = dict(enumerate(self.NAMES))
        model = tiny("bert", "token_classification", **SIZES, id2label=names, label2id={})
        task = load_task(self.tagged(tmp_path), tokenizer, model)
        row = task.train[0]
        assert [tag for tag in row["labels"] if tag != -100] == [0, 0, 0, 1]
        assert len(row["labels"]) == len(row["input_ids"]) > 6
        batch = collator(tokenizer, model)([row, {name: values[:5] for name, values in row.items()}])
        assert batch["labels"].shape == batch["input_ids"].shape
        assert batch["labels"][1, 5:].eq(-100).all()
        assert task.evaluate(model).keys() == {"entity_f1", "entity_precision", "entity_recall", "score"}

    def test_tags_that_are_no_entities_say_which_metric_to_take(self, tmp_path):
        with pytest.raises(DataError, match="token_accuracy"):
            read_task(self.tagged(tmp_path, ("NOUN", "VERB", "X")))


def test_a_regression_is_measured_by_correlations(tmp_path, tokenizer):
    rows = [{**row, "label": place / 3} for place, row in enumerate(PAIRS)]
    model = tiny("bert", "sequence_classification", **SIZES, num_labels=1)
    task = load_task(config(write(tmp_path / "stsb", train=rows, validation=rows), "glue/stsb"), tokenizer, model)
    assert collator(tokenizer, model)([task.train[0]])["labels"].dtype == torch.float32
    assert task.evaluate(model).keys() == {"pearson", "spearman", "score"}


def test_extra_text_has_labels_that_no_loss_looks_at(mrpc, tmp_path, tokenizer):
    extra = write(tmp_path / "extra", train=[{"text": "The names of a class"}] * 3)
    task = load_task(config(mrpc, extra_text=extra), tokenizer, classifier())
    assert len(task.distillation) == 15
    assert set(task.extra["label"]) == {-100}
    assert task.train.column_names == task.extra.column_names


LABELLED = [{"text": f"text {place}", "label": "ab"[place % 2]} for place in range(40)]
POOL = [{"text": row["text"]} for row in LABELLED] + [{"text": f"more text {place}"} for place in range(10)]


class TestExtraTextOfThePoolThatTheRowsAreOf:
    def read(self, folder, pool=POOL, **settings):
        own = {name: settings.pop(name) for name in ("validation",) if name in settings}
        data, extra = write(folder / "data", train=LABELLED, **own), write(folder / "extra", train=pool)
        return read_task(config(data, "classification", extra_text=extra, **settings))

    def test_rows_that_are_held_out_are_left_out_and_told(self, tmp_path, caplog):
        caplog.set_level("INFO")
        rows = self.read(tmp_path, held_out=0.3)
        held_out = rows.evaluation["held_out"]["text"]
        assert set(rows.extra["text"]) == {row["text"] for row in POOL} - set(held_out)
        told = f"{len(held_out)} of 50 rows of task.extra_text are measured on (task.held_out), and are left out"
        assert told in caplog.text

    def test_rows_of_it_that_are_held_out_but_not_measured_on_are_left_out(self, tmp_path):
        few, all_of_them = (self.read(tmp_path, held_out=0.3, evaluation_rows=count) for count in (2, None))
        assert not set(few.extra["text"]) & set(all_of_them.evaluation["held_out"]["text"])

    def test_rows_that_settings_are_chosen_by_are_left_out_beside_those_held_out(self, tmp_path):
        rows = self.read(tmp_path, held_out=0.2, tuning=0.3)
        assert not set(rows.extra["text"]) & set(rows.evaluation["tuning"]["text"])
        held_out = self.read(tmp_path, held_out=0.2).evaluation["held_out"]["text"]
        assert not set(rows.extra["text"]) & set(held_out)
        learned = set(rows.train["text"])
        assert set(rows.extra["text"]) == learned | {row["text"] for row in POOL[40:]}

    def test_rows_of_a_split_of_their_own_are_told_as_they_are_of_training_rows(self, tmp_path, caplog):
        validation = [{"text": f"more text {place}", "label": "ab"[place % 2]} for place in range(20)]
        rows = self.read(tmp_path, validation=validation)
        assert len(rows.extra) == 50
        assert "task.extra_text and split 'validation': 10 of 20 rows to evaluate on" in caplog.text

    def test_a_text_alone_is_no_pair_that_begins_with_it(self, mrpc, tmp_path):
        pool = [{"text": row["sentence1"]} for row in PAIRS]
        extra = write(tmp_path / "extra", train=pool)
        rows = read_task(config(mrpc, extra_text=extra, evaluation_splits=("held_out",), held_out=0.5))
        assert len(rows.extra) == len(pool)

    def test_nothing_but_rows_that_are_held_out_is_refused(self, tmp_path):
        held_out = self.read(tmp_path, held_out=0.2).evaluation["held_out"]["text"]
        with pytest.raises(DataError, match=r"All \d+ rows of task.extra_text .* are measured on \(task.held_out\)"):
            self.read(tmp_path, [{"text": text} for text in held_out], held_out=0.2)


class TestWrongInput:
    @pytest.mark.parametrize(
        ("settings", "error", "text"),
        [
            ({"name": "glue/colla"}, UnknownNameError, "Did you mean 'glue/cola'"),
            ({"name": "glue/cola", "metrics": ("mathews",)}, UnknownNameError, "'matthews'"),
            ({"name": "squad", "metrics": ("accuracy",)}, UnknownNameError, "exact_match"),
            ({"name": "classification"}, SettingError, "task.path"),
            ({"name": "glue/stsb", "labels": ("a", "b")}, SettingError, "regression"),
            ({"name": "glue/cola", "labels": ("a",)}, SettingError, "two or more"),
            ({"name": "glue/cola", "text_columns": ("a", "b", "c")}, SettingError, "1 or 2"),
            ({"name": "squad", "text_columns": ("a",)}, SettingError, "task.text_columns"),
            ({"name": "glue/cola", "rows": 0}, SettingError, "task.rows"),
        ],
    )
    def test_settings_are_checked_when_they_are_made(self, settings, error, text):
        with pytest.raises(error, match=text):
            TaskConfig(**settings)

    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            ({"name": "glue/qqp"}, "no column 'question1', 'question2'; it has sentence1, sentence2, label"),
            ({"label_column": "target"}, "no column 'target'; it has"),
            (
                {"text_columns": ("sentence1", "label")},
                "'label' of .* holds int64, not text. These hold text: sentence1",
            ),
            ({"train_split": "training"}, "no split 'training'; it has train, validation"),
            ({"evaluation_splits": ("dev",)}, "no split 'dev'; it has train, validation"),
            ({"name": "classification"}, "task.text_columns"),
        ],
    )
    def test_what_is_not_in_the_data_is_named_with_what_is(self, mrpc, settings, text):
        with pytest.raises(DataError, match=text):
            read_task(config(mrpc, **settings))

    @pytest.mark.parametrize(
        ("name", "row", "text"),
        [
            ("classification", {"text": "a", "label": [0, 1]}, "one label a row; .* has \\[0, 1\\]"),
            ("classification", {"text": "a", "label": "good"}, "the label 'good'; there is nothing to tell apart"),
            ("classification", {"text": "a", "label": 1}, "the label 1; there is nothing to tell apart"),
            ("question_answering", {"answers": "me"}, "Answers are as SQuAD has them"),
            ("question_answering", {"answers": {"text": "me", "answer_start": 6}}, "Answers are as SQuAD has them"),
            ("question_answering", {"context": None}, "has a context; in the split 'train' of .* one has none"),
            ("token_classification", {"tokens": "it is", "tags": ["O", "B-X"]}, "'tokens' of .* holds Value"),
            ("token_classification", {"tokens": ["it", "is"], "tags": ["O"]}, "has .*'is'.* with 1 tags"),
            ("token_classification", {"tokens": ["it", None], "tags": ["O", "B-X"]}, "None.* with 2 tags"),
        ],
    )
    def test_rows_of_another_form_are_refused_with_what_is_asked_for(self, tmp_path, name, row, text):
        columns = {}
        if name == "question_answering":
            row = {"question": "who", "context": "it is me", "answers": {"text": ["me"], "answer_start": [6]}, **row}
        if name == "token_classification":
            columns = {"text_columns": ("tokens",), "label_column": "tags", "labels": ("O", "B-X")}
        path = write(tmp_path / "rows", train=[row] * 4)
        with pytest.raises(DataError, match=text):
            read_task(TaskConfig(name=name, path=path, **columns))

    def test_one_row_cannot_be_taught_and_measured_on(self, tmp_path):
        with pytest.raises(DataError, match="has 1 rows; at least 2 are needed"):
            read_task(
                TaskConfig(name="classification", path=write(tmp_path / "one", train=[{"text": "a", "label": 1}]))
            )

    def test_labels_beyond_the_tasks_are_refused(self, tmp_path):
        path = write(tmp_path / "bad", train=[*PAIRS, {**PAIRS[0], "label": 2}], validation=PAIRS)
        with pytest.raises(DataError, match="label 2; the task's 2 labels are not_equivalent, equivalent"):
            read_task(config(path))

    def test_a_split_whose_labels_are_secret_is_refused(self, tmp_path):
        path = write(tmp_path / "glue", train=PAIRS, test=[{**row, "label": -1} for row in PAIRS])
        with pytest.raises(DataError, match="kept secret"):
            read_task(config(path, evaluation_splits=("test",)))

    @pytest.mark.parametrize(
        ("name", "row", "secret", "absent"),
        [
            ("token_classification", {"tokens": ["it", "is"], "ner_tags": [0, 1]}, {"ner_tags": [-1, -1]}, "-1"),
            (
                "squad",
                {"question": "who", "context": "it is me", "answers": {"text": ["me"], "answer_start": [6]}},
                {"answers": {"text": [], "answer_start": []}},
                "empty",
            ),
        ],
        ids=["tags", "answers"],
    )
    def test_a_split_is_secret_only_where_nothing_in_it_has_a_label(self, tmp_path, name, row, secret, absent):
        named = {"labels": ("O", "B-X")} if name == "token_classification" else {}
        path = write(tmp_path / "some", train=[row] * 4, validation=[row, {**row, **secret}])
        assert len(read_task(config(path, name, **named)).evaluation["validation"]) == 2
        write(tmp_path / "some", validation=[{**row, **secret}] * 3)
        with pytest.raises(DataError, match=f"split 'validation' .*all of them are {absent}.* kept secret"):
            read_task(config(path, name, **named))

    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            ({"rows": 20}, r"All 20 rows of .* trained on have the same label, 'neg'.* shuffle it; .*\(task.rows\)"),
            ({"evaluation_rows": 9}, r"All 9 rows of split 'validation' .* 'neg'.*\(task.evaluation_rows\)"),
            ({"rows": 20, "tuning": 0.2}, "trained on have the same label"),
        ],
    )
    def test_rows_of_one_class_alone_of_data_that_is_sorted_by_class(self, tmp_path, settings, text):
        form = Features(text=Value("string"), label=ClassLabel(names=["neg", "pos"]))
        texts = [f"text {place}" for place in range(60)]
        for split in ("train", "validation"):
            rows = Dataset.from_dict({"text": texts, "label": [place // 30 for place in range(60)]}, features=form)
            rows.to_parquet(tmp_path / f"{split}.parquet")
        assert read_task(config(str(tmp_path), "classification")).labels == ("neg", "pos")
        with pytest.raises(DataError, match=text):
            read_task(config(str(tmp_path), "classification", **settings))

    def test_f1_of_more_than_two_classes_says_what_to_take(self, tmp_path):
        rows = [{"text": f"text {place}", "label": "abc"[place % 3]} for place in range(12)]
        with pytest.raises(DataError, match=r"f1 is of two classes, .* has 3: a, b, c. Take task.metrics \[macro_f1\]"):
            read_task(config(write(tmp_path / "three", train=rows), "classification", metrics=("accuracy", "f1")))

    def test_words_with_one_tag_alone(self, tmp_path):
        rows = [{"tokens": ["it", "is"], "ner_tags": tags} for tags in (["O", "O"], ["O", "B-X"])]
        path = write(tmp_path / "words", train=rows, validation=rows[:1])
        with pytest.raises(DataError, match=r"All 1 rows of split 'validation' .* have the same label, 'O'"):
            read_task(config(path, "token_classification", labels=("O", "B-X")))

    def test_rows_longer_than_the_model_can_read(self, mrpc, tokenizer):
        with pytest.raises(DataError, match="positions for 64"):
            tokenize_task(read_task(TaskConfig(name="glue/mrpc", path=mrpc)), tokenizer, classifier())


DATA = os.environ.get("MAKD_DATA")
REAL = {
    "glue/cola": "glue_cola", "glue/sst2": "glue_sst2", "glue/mrpc": "glue_mrpc", "glue/stsb": "glue_stsb",
    "glue/mnli": "glue_mnli", "glue/qqp": "qqp_subset", "squad": "squad",
}  # fmt: skip


@pytest.mark.parametrize("name", REAL if DATA else [])
def test_real_data_has_the_columns_and_labels_of_its_task(name):
    task = TaskConfig(name=name, path=str(Path(DATA) / REAL[name]), rows=20, evaluation_rows=20)
    rows = read_task(task)
    assert rows.labels == (TASKS[name].labels or ())
    assert len(rows.train) == 20
    assert len(rows.evaluation) == (2 if name == "glue/mnli" else 1)
