"""A folder is read whole, or refused with the names of what would be left out."""

import pytest

import makd
from makd.data import DataConfig, load_texts

CSV, JSON, TEXT = "text\na text\nanother text\n", '{"text": "a text"}\n{"text": "another"}\n', "a text\nanother\n"


def fill(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return DataConfig(path=str(folder))


def test_a_folder_of_several_formats_names_what_would_not_be_read(tmp_path):
    config = fill(tmp_path, a_csv=CSV, b_jsonl=JSON, c_txt=TEXT)
    with pytest.raises(makd.MakdError, match=r"would be read: b\.jsonl, but not a\.csv, c\.txt"):
        load_texts(config)


def test_a_file_beside_files_that_are_named_for_splits_is_not_left_out_in_silence(tmp_path):
    config = fill(tmp_path, train_csv=CSV, test_csv=CSV, extra_csv=CSV)
    with pytest.raises(makd.MakdError, match=r"would be read: test\.csv, train\.csv, but not extra\.csv"):
        load_texts(config)


def test_papers_about_the_data_are_no_data(tmp_path):
    config = fill(tmp_path, train_csv=CSV, LICENSE_txt=TEXT, README_txt=TEXT, requirements_txt=TEXT)
    assert len(load_texts(config).train) == 1


def test_files_of_one_format_are_read_in_every_folder_below(tmp_path):
    config = fill(tmp_path, data__a_jsonl=JSON, data__b_jsonl=JSON)
    texts = load_texts(config)
    assert len(texts.train) + len(texts.evaluation) == 4


def test_a_card_that_lists_configurations_says_itself_what_belongs_together(tmp_path):
    card = "---\nconfigs:\n- config_name: default\n  data_files: a.csv\n---\n"
    config = fill(tmp_path, README_md=card, a_csv=CSV, b_csv=CSV)
    texts = load_texts(config)
    assert len(texts.train) + len(texts.evaluation) == 2
