"""Which column is taken for the text where nobody says so, and which guesses are refused."""

import json

import pytest

import makd
from makd.data import DataConfig, load_texts

CHAT = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A row of things."}]


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_conversations_under_another_name_are_not_guessed_and_what_to_do_is_said(tmp_path):
    path = write(tmp_path, [{"id": "a-17", "turns": CHAT}] * 4)
    with pytest.raises(makd.MakdError, match=r"it has id, turns.*'turns' looks like conversations.*messages_column"):
        load_texts(DataConfig(path=path))


def test_conversations_are_not_read_as_text(tmp_path):
    path = write(tmp_path, [{"prompt": "a text", "messages": CHAT}] * 4)
    with pytest.raises(makd.MakdError, match=r"'messages' of .* not text.*looks like conversations"):
        load_texts(DataConfig(path=path, text_columns=("messages",)))


@pytest.mark.parametrize("values", [["a-17", "b-18"], ["positive", "negative"], ["https://a.org/1", "https://a.org/2"]])
def test_a_column_of_names_or_labels_is_not_taken_for_the_text(tmp_path, values):
    path = write(tmp_path, [{"key": value, "number": 3} for value in values])
    with pytest.raises(
        makd.MakdError,
        match=r"'key', holds single words like .*data\.text_columns, such as '\[key\]' \(it has key, num",
    ):
        load_texts(DataConfig(path=path))
    assert len(load_texts(DataConfig(path=path, text_columns=("key",))).train) == 1


@pytest.mark.parametrize(
    "other", [{"translation": {"en": "A long text", "fr": "Un long texte"}}, {"input_ids": [5] * 40}]
)
def test_a_column_that_holds_less_than_another_is_not_taken(tmp_path, other):
    path = write(tmp_path, [{"source": "the web", **other}] * 4)
    with pytest.raises(makd.MakdError, match=f"'source', holds less than '{next(iter(other))}'"):
        load_texts(DataConfig(path=path))


@pytest.mark.parametrize("text", ["A film about a list, seen twice.", "这是一个关于清单的故事"])
def test_the_only_column_of_strings_is_taken_beside_shorter_lists(tmp_path, text):
    path = write(tmp_path, [{"review": f"{text} {n}", "tags": ["new"], "scores": [0.5] * 60} for n in range(4)])
    assert {found[:-2] for found in load_texts(DataConfig(path=path)).train["text"]} == {text}


@pytest.mark.parametrize("sign", [";", "\t", "|"])
def test_a_csv_file_whose_values_do_not_stand_apart_by_commas_is_no_text(tmp_path, sign):
    path = tmp_path / "rows.csv"
    path.write_text("".join(f"{one}{sign}{two}\n" for one, two in [("review", "label"), *(("a good film", "1"),) * 4]))
    with pytest.raises(makd.MakdError, match=r"has one column, 'review.*label': its values stand apart by .*by commas"):
        load_texts(DataConfig(path=str(path)))


def test_the_column_that_was_guessed_is_told(tmp_path, caplog):
    path = write(tmp_path, [{"body": f"text number {number}"} for number in range(4)])
    with caplog.at_level("INFO"):
        load_texts(DataConfig(path=path))
    assert "rows.jsonl are read from its column 'body'" in caplog.text


def test_the_folder_that_one_is_in_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("one\ntwo\nthree\n")
    monkeypatch.chdir(tmp_path)
    assert len(load_texts(DataConfig(path=".")).train) == 2
