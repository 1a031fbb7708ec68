"""Answers that are not where they say: found again where that is certain, else not learned from."""

import pytest
from datasets import Dataset, Features, List, Value

from makd.tasks import TaskConfig, load_task, read_task
from makd.tasks.features import NOWHERE
from tests.models import tiny
from tests.tasks.test_tasks import SIZES

CONTEXT = "The list has a name, and the class has a name too."
RIGHT, MOVED, TWICE, ABSENT = (
    {"text": ["the class"], "answer_start": [CONTEXT.index("the class")]},
    {"text": ["the class"], "answer_start": [3]},
    {"text": ["a name"], "answer_start": [0]},
    {"text": ["a method"], "answer_start": [0]},
)
NONE = {"text": [], "answer_start": []}


def task(tmp_path, train, validation):
    features = Features(
        question=Value("string"), context=Value("string"),
        answers={"text": List(Value("string")), "answer_start": List(Value("int32"))},
    )  # fmt: skip
    (tmp_path / "qa").mkdir()
    for split, answers in (("train", train), ("validation", validation)):
        rows = [{"question": f"What {place}?", "context": CONTEXT, "answers": own} for place, own in enumerate(answers)]
        Dataset.from_list(rows, features=features).to_parquet(tmp_path / "qa" / f"{split}.parquet")
    return TaskConfig(name="squad_v2", path=str(tmp_path / "qa"), max_length=60, stride=8)


def test_an_answer_that_is_there_once_is_found_again_and_said(tmp_path, caplog):
    rows = read_task(task(tmp_path, [RIGHT, MOVED, NONE], [RIGHT]))
    assert [row["answer_start"] for row in rows.train["answers"]] == [RIGHT["answer_start"]] * 2 + [[]]
    assert "1 rows of split 'train'" in caplog.text
    assert "found again" in caplog.text


@pytest.mark.parametrize("answers", [TWICE, ABSENT])
def test_an_answer_that_is_not_there_or_more_than_once_is_not_learned_from(tmp_path, caplog, answers):
    rows = read_task(task(tmp_path, [RIGHT, answers, NONE], [RIGHT]))
    assert [row["text"] for row in rows.train["answers"]] == [["the class"], []]
    assert "1 rows of split 'train'" in caplog.text
    assert "left out" in caplog.text


def test_the_first_answer_that_is_there_is_learned(tmp_path):
    both = {"text": ["a method", "the class"], "answer_start": [0, 3]}
    rows = read_task(task(tmp_path, [both, RIGHT], [RIGHT]))
    assert rows.train["answers"][0]["text"] == ["the class", "a method"]


def test_rows_to_measure_on_keep_their_texts_and_teach_no_place(tmp_path, tokenizer):
    model = tiny("bert", "question_answering", **SIZES)
    loaded = load_task(task(tmp_path, [RIGHT, RIGHT], [RIGHT, TWICE]), tokenizer, model)
    assert [row["text"] for row in loaded.references["validation"]["answers"]] == [["the class"], ["a name"]]
    places = {(row["question"], row["start_positions"] == NOWHERE) for row in loaded.held_out}
    assert places == {(0, False), (1, True)}


def test_answers_that_are_where_they_say_are_left_as_they_are(tmp_path, caplog):
    config = task(tmp_path, [RIGHT, NONE], [RIGHT, NONE])
    assert read_task(config).train["answers"] == [RIGHT, NONE]
    assert "left out" not in caplog.text


def test_a_first_answer_that_is_nowhere_is_not_learned_where_another_is_right(tmp_path, caplog):
    both = {"text": ["a method", "the class"], "answer_start": [0, CONTEXT.index("the class")]}
    rows = read_task(task(tmp_path, [both, RIGHT], [RIGHT]))
    assert rows.train["answers"][0]["text"] == ["the class", "a method"]
    assert "1 rows of split 'train'" in caplog.text
    assert "another of theirs is learned" in caplog.text
