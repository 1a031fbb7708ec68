"""From a name to texts: built-in, folder, file, list; and what is refused."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset

import makd
from makd.data import DataConfig, Source, hold_out, load_texts
from makd.errors import DataError


def write_csv(folder: Path, rows: list[tuple[str, str, int]]) -> Path:
    path = folder / "rows.csv"
    lines = ["sentence1,sentence2,label", *(f"{one},{two},{label}" for one, two, label in rows)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_the_built_in_text_needs_nothing_and_holds_out_passages_that_training_never_sees():
    texts = load_texts(DataConfig(path="pydoc"))
    assert len(texts.train) > 500
    assert 50 < len(texts.evaluation) < len(texts.train) / 5
    assert not set(texts.train["text"]) & set(texts.evaluation["text"])


def test_a_text_file_is_a_row_a_line_without_blank_ones(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\n\n  \ntwo\nthree\nfour\n", encoding="utf-8")
    texts = load_texts(DataConfig(path=str(path), held_out=0.25))
    assert sorted([*texts.train["text"], *texts.evaluation["text"]]) == ["four", "one", "three", "two"]
    assert len(texts.evaluation) == 1


def test_pairs_are_found_by_column_name(tmp_path):
    path = write_csv(tmp_path, [("a", "b", 1), ("c", "d", 0), ("e", "f", 1)])
    texts = load_texts(DataConfig(path=str(path), text_columns=("sentence1", "sentence2"), held_out=0.34))
    assert sorted(texts.train.column_names) == ["text", "text_pair"]


def test_a_column_that_is_called_text_may_be_the_second_of_a_pair(tmp_path):
    (tmp_path / "rows.csv").write_text("text,title\n" + "long,short\n" * 3)
    texts = load_texts(DataConfig(path=str(tmp_path / "rows.csv"), text_columns=("title", "text")))
    assert texts.train[0] == {"text": "short", "text_pair": "long"}


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_the_only_column_of_strings_is_the_text_in_whatever_form_arrow_has_them(tmp_path, kind):
    path = tmp_path / "rows.parquet"
    table = pa.table({"number": [1, 2, 3], "review": pa.array(["one film", "two films", "three"], kind)})
    Dataset(table).to_parquet(str(path))
    texts = load_texts(DataConfig(path=str(path), held_out=0.34))
    assert sorted([*texts.train["text"], *texts.evaluation["text"]]) == ["one film", "three", "two films"]


def test_the_only_column_of_strings_of_a_csv_file_is_the_text(tmp_path):
    (tmp_path / "rows.csv").write_text("number,review\n1,one film\n2,two films\n3,three\n")
    texts = load_texts(DataConfig(path=str(tmp_path / "rows.csv"), held_out=0.34))
    assert sorted([*texts.train["text"], *texts.evaluation["text"]]) == ["one film", "three", "two films"]


def test_a_folder_of_parquet_uses_its_own_validation_split(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split, text in (("train", "seen"), ("validation", "unseen")):
        Dataset.from_dict({"text": [text] * 3}).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    texts = load_texts(DataConfig(path=str(tmp_path)))
    assert set(texts.train["text"]) == {"seen"}
    assert set(texts.evaluation["text"]) == {"unseen"}


def lines(path, count=50):
    path.write_text("".join(f"text {index} of {path.stem}\n" for index in range(count)))
    return str(path)


@pytest.mark.parametrize("form", ["file", "mixture", "stream"])
def test_the_same_rows_are_held_out_whatever_the_seed(tmp_path, form):
    one, other = (lines(tmp_path / f"{name}.txt") for name in ("one", "other"))
    config = {
        "file": DataConfig(path=one),
        "mixture": DataConfig(mixture=(Source(path=one), Source(path=other, weight=2.0)), rows=30),
        "stream": DataConfig(path=one, stream=True, rows=40),
    }[form]
    found = [load_texts(config, seed) for seed in (0, 1)]
    assert found[0].evaluation["text"] == found[1].evaluation["text"]
    for seen in found:  # nothing that any seed trains on is held out by another
        assert not set(seen.train["text"]) & set(found[0].evaluation["text"])
    assert (found[0].train["text"] != found[1].train["text"]) == (form == "mixture")


def test_rows_limits_the_training_rows_only():
    texts = load_texts(DataConfig(path="pydoc", rows=10))
    assert len(texts.train) == 10
    assert len(texts.evaluation) > 50


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"max_length": 1}, "max_length is at least 2 tokens; got 1"),
        ({"held_out": 1.0}, r"in \(0, 1\); got 1.0"),
        ({"rows": 0}, "rows is at least 1"),
        ({"text_columns": ()}, "one column, or two"),
        ({"text_columns": ("a", "a")}, r"data\.text_columns names 'a' twice"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_made(settings, hint):
    with pytest.raises(makd.MakdError, match=hint):
        DataConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"path": "./nowhere"}, "does not exist"),
        ({"path": "nowhere.txt"}, "does not exist"),
        ({"path": "some/folder/nowhere"}, "does not exist"),
        ({"path": "{folder}/rows.xml"}, "known files are"),
        ({"path": "{folder}/rows.csv", "text_columns": ("sentence",)}, "no column 'sentence'; it has sentence1"),
        ({"path": "{folder}/rows.csv"}, "data.text_columns"),
        ({"path": "{folder}/rows.csv", "text_columns": ("sentence1", "label")}, "'label' of .* holds int64, not text"),
        ({"path": "{folder}/rows.csv", "text_columns": ("sentence1",), "evaluation_split": "dev"}, "no split 'dev'"),
        ({"path": "{folder}/blank.txt"}, "every row of column 'text' is blank"),
        ({"path": "{folder}/one.txt"}, "at least 2 are needed"),
        (
            {"path": "{folder}/rows.csv", "text_columns": ("sentence1",), "held_out": 0.999},
            r"data\.held_out = 0\.999 of 2 rows are all of them",
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused_with_what_is_there(tmp_path, settings, hint):
    write_csv(tmp_path, [("a", "b", 1), ("c", "d", 0)])
    (tmp_path / "rows.xml").write_text("<rows/>")
    (tmp_path / "blank.txt").write_text("\n\n")
    (tmp_path / "one.txt").write_text("only this\n")
    settings = {**settings, "path": settings["path"].format(folder=tmp_path)}
    config = DataConfig(**settings)
    with pytest.raises(makd.MakdError, match=hint):
        load_texts(config)


def test_blank_rows_and_null_rows_are_counted(tmp_path, caplog):
    path = tmp_path / "rows.parquet"
    Dataset.from_dict({"text": ["a text", None, " ", "another", None, "a third"]}).to_parquet(str(path))
    with caplog.at_level("INFO", "makd"):
        texts = load_texts(DataConfig(path=str(path)))
    assert len(texts.train) + len(texts.evaluation) == 3
    assert caplog.messages == [f"3 of 6 rows of {path}, column 'text', hold no text (2 null): left out"]
    assert caplog.records[0].levelname == "WARNING"


def test_blank_texts_in_hand_are_counted(caplog):
    with caplog.at_level("INFO", "makd"):
        texts = hold_out(["one", "", "two", "\n"], DataConfig())
    assert sorted([*texts.train["text"], *texts.evaluation["text"]]) == ["one", "two"]
    assert caplog.messages == ["2 of 4 rows of the texts hold no text (0 null): left out"]


def test_texts_in_hand_are_strings():
    with pytest.raises(makd.MakdError, match="one of them is '3', of type int"):
        hold_out(["one", "two", 3], DataConfig())


@pytest.mark.skipif("MAKD_DATA" not in os.environ, reason="MAKD_DATA (folder of real data sets) is not set")
@pytest.mark.parametrize(
    ("folder", "columns"),
    [("glue_mrpc", ("sentence1", "sentence2")), ("glue_sst2", ("sentence",)), ("wikitext2", None)],
)
def test_real_data_sets_load_from_a_folder(folder, columns):
    path = Path(os.environ["MAKD_DATA"]) / folder
    texts = load_texts(DataConfig(path=str(path), text_columns=columns, rows=100))
    assert len(texts.train) == 100
    assert len(texts.evaluation) > 100


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [("empty.jsonl", "", "is empty"), ("broken.csv", 'text,label\n"a,1\n', "EOF inside string")],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(makd.MakdError, match=told):
        load_texts(DataConfig(path=str(tmp_path / name)))


@pytest.mark.parametrize("setting", [{"template": "{prompt} then"}, {"system": "Be kind."}])
def test_settings_of_conversations_are_refused_where_the_text_is_plain(tmp_path, setting):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "row {number}", "messages": []}}\n' for number in range(4)))
    (name,) = setting
    with pytest.raises(makd.MakdError, match=rf"data\.{name} is .* is read as plain text.*leave data\.{name} out"):
        load_texts(DataConfig(path=str(path), **setting))
    with pytest.raises(makd.MakdError, match="the rows in hand is read as plain text"):
        hold_out([{"text": "a"}, {"text": "b"}], DataConfig(**setting))


@pytest.mark.parametrize(
    "setting", [{"name": "a"}, {"train_split": "all"}, {"evaluation_split": "test"}, {"text_columns": ("body",)}]
)
def test_settings_that_the_built_in_text_has_no_use_for_are_refused(setting):
    with pytest.raises(makd.MakdError, match=f"Python's documentation, which has no {next(iter(setting))}"):
        DataConfig(path="pydoc", **setting)


def test_a_share_of_the_built_in_text_to_hold_out_is_refused():
    with pytest.raises(makd.MakdError, match=r"data\.held_out is 0\.5, and of pydoc every 6th passage is held out"):
        load_texts(DataConfig(path="pydoc", held_out=0.5))


def test_a_file_has_no_configurations(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo\n")
    with pytest.raises(makd.MakdError, match="is a file, which has no configurations; got 'cola'"):
        load_texts(DataConfig(path=str(path), name="cola"))


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (["a text", "an emoji, cut \ud83d"], "number 1 is not. It holds half of a surrogate pair"),
        ([{"text": "a text"}, {"text": "cut \ud83d"}], "of row 1 one is none. It holds half of a surrogate pair"),
    ],
)
def test_a_text_that_was_cut_inside_an_emoji_is_told_with_its_place(texts, told):
    with pytest.raises(DataError, match=told):
        hold_out(texts, DataConfig())
