"""Which rows are held out: what they say decides, whatever file, order and number they come in."""

import json
import logging

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from makd.data import DataConfig, hold_out, load_texts, split_off

TEXTS = [f"This is the text of the number {number}." for number in range(400)]


def sides(texts, share=0.1):
    train, evaluation = split_off(Dataset.from_dict({"text": list(texts)}), share, "data.held_out")
    return train["text"], evaluation["text"]


@settings(max_examples=30)
@given(st.randoms(use_true_random=False), st.integers(100, 400))
def test_no_text_that_is_held_out_of_some_rows_is_learned_from_in_others(random, count):
    (train, evaluation), (other_train, other_evaluation) = sides(TEXTS), sides(random.sample(TEXTS, count))
    assert not set(train) & set(other_evaluation)
    assert not set(other_train) & set(evaluation)


def test_a_measurement_of_the_whole_file_holds_out_nothing_that_a_run_on_its_first_rows_learned_from(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    few, all_of_them = (load_texts(DataConfig(path=str(path), rows=rows)) for rows in (150, None))
    assert not set(few.train["text"]) & set(all_of_them.evaluation["text"])
    assert set(few.evaluation["text"]) <= set(all_of_them.evaluation["text"])


def test_a_larger_share_holds_out_what_a_smaller_one_does():
    assert set(sides(TEXTS, 0.1)[1]) < set(sides(TEXTS, 0.3)[1])


def test_a_text_that_stands_several_times_is_on_one_side():
    train, evaluation = sides(TEXTS * 3, 0.3)
    assert len(train) + len(evaluation) == 1200
    assert not set(train) & set(evaluation)


def test_all_answers_to_a_question_are_on_one_side():
    rows = [{"prompt": f"What is {number % 40}?", "response": f"It is {number}."} for number in range(200)]
    found = hold_out(rows, DataConfig(held_out=0.3))
    asked = [{row["messages"][0]["content"] for row in side} for side in (found.train, found.evaluation)]
    assert len(asked[0] | asked[1]) == 40
    assert not asked[0] & asked[1]


def test_about_the_share_that_was_asked_for_is_held_out():
    train, evaluation = sides([f"{number} of many" for number in range(20_000)], 0.1)
    assert len(evaluation) == pytest.approx(2000, abs=130)  # 3 standard deviations
    assert len(train) + len(evaluation) == 20_000


@pytest.mark.parametrize("share", [0.001, 0.5, 0.6])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_of_a_few_rows_each_side_gets_some(count, share):
    if round(share * count) < count:
        train, evaluation = sides(TEXTS[:count], share)
        assert train
        assert evaluation
        assert sorted([*train, *evaluation]) == sorted(TEXTS[:count])


def test_the_first_held_out_rows_of_a_sorted_file_are_of_all_kinds():
    held = sides(sorted(TEXTS, key=lambda text: text[::-1]), 0.5)[1]
    assert held == sides(TEXTS, 0.5)[1]  # no file's order is in it
    assert held != sorted(held)


def test_that_all_rows_say_the_same_is_told(caplog):
    train, evaluation = sides(["once more"] * 5, 0.4)
    assert (len(train), len(evaluation)) == (3, 2)
    assert "All 5 rows say the same: those that are held out are learned from, too" in caplog.text


@pytest.mark.parametrize(("shared", "level"), [(5, logging.WARNING), (1, logging.INFO), (0, None)])
def test_rows_of_a_split_to_evaluate_on_that_are_trained_on_are_counted(tmp_path, caplog, shared, level):
    for name, texts in (("train", TEXTS[:200]), ("test", TEXTS[200 - shared :])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with caplog.at_level(logging.INFO, logger="makd"):
        load_texts(DataConfig(path=str(tmp_path)))
    told = [record for record in caplog.records if "among those to train on" in record.getMessage()]
    assert [record.levelno for record in told] == ([] if level is None else [level])
    share = 100 * shared / (200 + shared)
    for record in told:
        assert f"{shared} of {200 + shared} rows to evaluate on, {share:.1f} % of their text" in record.getMessage()
