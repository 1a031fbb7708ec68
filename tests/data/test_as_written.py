"""Names in csv files that pandas takes for nothing, and byte order marks, which are no letters."""

import pytest

from makd.data import DataConfig, load_splits, load_texts
from makd.tasks import TaskConfig, read_task

NAMES = ["None", "NA", "null", "nan", "N/A", "<NA>"]


def write(path, header, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([",".join(header), *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_a_class_may_be_called_so(tmp_path, name):
    stances = ["favor", "against", name]
    rows = [(f"text {place}", stances[place % 3]) for place in range(9)]
    for split in ("train", "validation"):
        write(tmp_path / "data" / f"{split}.csv", ("text", "label"), rows)
    task = read_task(TaskConfig(name="classification", path=str(tmp_path / "data")))
    assert set(task.labels) == set(stances)
    assert len(task.train) == len(task.evaluation["validation"]) == 9


def test_a_text_may_be_one_and_an_empty_field_is_none(tmp_path):
    path = write(tmp_path / "texts.csv", ("text", "more"), [("NA", 1), ("", 1), ("a text", 1), ("None", 1)])
    texts = load_texts(DataConfig(path=path, held_out=0.4))
    assert {*texts.train["text"], *texts.evaluation["text"]} == {"NA", "a text", "None"}


def test_numbers_that_are_missing_are_missing_beside_such_names(tmp_path):
    rows = [("NA", 1, "NA", 0.5), ("a", "", "2.5", 1.5), ("", 2, "nan", "null")]
    found = load_splits(write(tmp_path / "rows.csv", ("text", "label", "score", "more"), rows))["train"]
    assert [feature.dtype for feature in found.features.values()][1:] == ["float64"] * 3
    assert found["text"][:] == ["NA", "a", None]
    missing = {name: [value is None or value != value for value in found[name]] for name in ("label", "score", "more")}
    assert missing == {"label": [False, True, False], "score": [True, False, True], "more": [False, False, True]}


@pytest.mark.parametrize("place", ["texts.txt", "folder/train.txt"])
def test_a_byte_order_mark_is_no_letter_of_the_first_text(tmp_path, place):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text("one\ntwo\n", encoding="utf-8-sig")
    assert load_splits(str(path if place == "texts.txt" else path.parent))["train"]["text"][:] == ["one", "two"]
