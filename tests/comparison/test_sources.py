"""Cells of other weights or another text than the first ones are not put beside them: settings alone do not tell."""

import json
import shutil

import pytest

import makd
from makd.ablation import ablate
from makd.comparison.sources import SOURCES_FILE, check_sources
from makd.errors import OutputError
from tests.comparison.experiments import make
from tests.tasks.test_tasks import PAIRS, write


@pytest.fixture
def teacher(encoder_folder, tmp_path):
    return shutil.copytree(encoder_folder, tmp_path / "teacher")


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.jsonl").write_text('{"text": "a list of names"}\n')
    return tmp_path / "text"


def check(folder, teacher, text):
    check_sources(folder, [str(teacher), None], {str(text): str(text)})


def add_a_row(text):
    with (text / "train.jsonl").open("a") as file:
        file.write('{"text": "another"}\n')


def replace_a_weight(teacher):
    path = teacher / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", ["weights", "config", "rows", "a file more", "a name"])
def test_what_has_changed_is_refused_by_its_path(teacher, text, tmp_path, change):
    check(tmp_path / "runs", teacher, text)
    check(tmp_path / "runs", teacher, text)
    changed = teacher
    if change == "weights":
        replace_a_weight(teacher)
    elif change == "config":
        config = json.loads((teacher / "config.json").read_text())
        (teacher / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    else:
        changed = text
        if change == "rows":
            add_a_row(text)
        elif change == "a file more":
            shutil.copy(text / "train.jsonl", text / "train_2.jsonl")
        else:
            (text / "train.jsonl").rename(text / "test.jsonl")
    with pytest.raises(OutputError, match=rf"{changed} is not what {changed} was when results in .*runs were begun"):
        check(tmp_path / "runs", teacher, text)
    check(tmp_path / "others", teacher, text)


def test_what_is_written_about_a_model_or_beside_it_changes_nothing(teacher, text, tmp_path):
    check(teacher / "runs", teacher, text)
    (teacher / "README.md").write_text("A teacher.")
    (text / "README.md").write_text("A text.")
    check(teacher / "runs", teacher, text)
    check(text / "runs", teacher, text)
    (text / "runs" / "more.jsonl").write_text("{}\n")
    check(text / "runs", teacher, text)


def test_a_path_that_is_new_to_a_folder_is_noted(teacher, text, tmp_path):
    check_sources(tmp_path / "runs", [str(teacher)], {"org/name": "org/name", "pydoc": "pydoc"})
    check(tmp_path / "runs", teacher, text)
    lines = (tmp_path / "runs" / SOURCES_FILE).read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == [str(teacher), str(text)]


def test_an_ablation_asks(teacher, text, tmp_path, monkeypatch):
    monkeypatch.setattr("makd.ablation.run._run_seed", lambda *_: [])
    monkeypatch.setattr("makd.ablation.run.ablation_table", lambda _: type("Table", (), {"markdown": ""}))
    asked = (str(teacher), str(text), makd.Budget(keep_linears=0.5), makd.Recipe(device="cpu"), tmp_path / "runs")
    ablate(*asked)
    add_a_row(text)
    with pytest.raises(OutputError, match="Name another output"):
        ablate(*asked)


def test_a_comparison_asks_of_its_tasks_in_the_folder_of_data(teacher, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("mrpc", "stsb"):
        write(tmp_path / "data" / name, train=PAIRS, validation=PAIRS[:6])
    monkeypatch.setattr("makd.comparison.run.run_here", lambda *_: None)
    experiment = make(tmp_path / "data", teacher, tmp_path / "runs")
    assert makd.compare(experiment) == []
    write(tmp_path / "data" / "mrpc", train=PAIRS[1:], validation=PAIRS[:6])
    with pytest.raises(OutputError, match=r"data/mrpc is not what mrpc was"):
        makd.compare(experiment)


def test_another_folder_of_data_is_other_data_and_the_same_data_elsewhere_are_the_same(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr("makd.comparison.run.run_here", lambda *_: None)
    for folder, rows in (("first", PAIRS), ("second", PAIRS[1:])):
        (tmp_path / folder).mkdir()
        for name in ("mrpc", "stsb"):
            write(tmp_path / folder / name, train=rows, validation=PAIRS[:6])
    makd.compare(make(tmp_path / "first", teacher, tmp_path / "runs"))
    with pytest.raises(OutputError, match=r"second/mrpc is not what mrpc was"):
        makd.compare(make(tmp_path / "second", teacher, tmp_path / "runs"))
    (tmp_path / "first").rename(tmp_path / "moved")
    assert makd.compare(make(tmp_path / "moved", teacher, tmp_path / "runs")) == []
