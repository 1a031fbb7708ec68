"""`makd bench` as a user meets it: the table, the card, the faster student, and a clear error for every wrong input."""

import json
import shutil

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import makd
from makd import pipeline
from makd.evaluation import speed as measuring
from makd.loading import load_model
from makd.report import write_report
from makd.run_folder.speed import BEGIN, END, with_section
from makd.student.folding import factored_linears

QUICK = ["--batches", "[1, 2]", "--lengths", "[8]", "--repeats", "1"]
SETTINGS = makd.BenchConfig(batches=(1,), lengths=(8,), repeats=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory, encoder_folder):
    """A student folder as `makd factorize` leaves it; not to be written to."""
    folder = tmp_path_factory.mktemp("made") / "student"
    pipeline.factorize_only(
        str(encoder_folder),
        makd.DataConfig(path="pydoc", rows=40, max_length=16),
        makd.Budget(keep_linears=0.5),
        makd.Recipe(device="cpu", factorize=makd.FactorizeConfig(solver="svd")),
        folder,
    )
    return folder


@pytest.fixture
def student(made, tmp_path):
    return shutil.copytree(made, tmp_path / "student")


@pytest.fixture
def slow_factors(monkeypatch):
    """Every linear counts as slower when it is factored, whatever the clock says."""
    monkeypatch.setattr(measuring, "FOLD_FROM", 0.0)


def test_the_table_is_printed_and_put_into_the_card(run, student, encoder_folder):
    before = (student / "README.md").read_text()
    code, out, err = run("bench", student, "--teacher", encoder_folder, *QUICK)
    assert code == 0, err
    for words in ("1 x 8", "2 x 8", "all folded", "best", "linears at 1 x 8 tokens"):
        assert words in out
    card = (student / "README.md").read_text()
    assert card.startswith(before.rstrip())
    assert card.count("| 1 x 8 | eager | teacher |") == card.count("## Speed") == 1
    found = json.loads((student / "bench.json").read_text())
    assert found["settings"]["batches"] == [1, 2]
    assert found["environment"]["threads"] == torch.get_num_threads()
    assert len(found["speed"]["forwards"]) == 8


def test_the_next_table_replaces_the_last_and_nothing_else(student, encoder_folder):
    card = student / "README.md"
    makd.bench(str(student), str(encoder_folder), SETTINGS)
    card.write_text(card.read_text() + "\nMy own notes.\n")
    makd.bench(str(student), str(encoder_folder), makd.BenchConfig(batches=(2,), lengths=(4,), repeats=1))
    text = card.read_text()
    assert text.count("## Speed") == text.count(BEGIN) == text.count(END) == 1
    assert "| 2 x 4 |" in text
    assert "| 1 x 8 |" not in text
    assert text.endswith("\nMy own notes.\n")
    assert not list(student.glob("*.part"))


@pytest.mark.parametrize("card", ["", f"# A\n{BEGIN}\nmine\n", f"# A\n{END}\nmine\n", "# A\nmine"])
def test_a_section_is_added_to_any_card_and_found_again(card):
    once = with_section(card, "one\n")
    assert once.startswith(card.rstrip())
    twice = with_section(once, "two\n")
    assert twice == once.replace("one\n", "two\n")


def test_fold_saves_a_student_with_the_slow_linears_dense(run, student, encoder_folder, tmp_path, slow_factors):
    output = tmp_path / "faster"
    code, out, err = run("bench", student, "--teacher", encoder_folder, *QUICK, "--fold", "--output", output)
    assert code == 0, err
    names = {path.name for path in output.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "recipe.yaml", "metrics.json", "README.md",
            "bench.json"} == names - {"tokenizer_config.json", "environment.json", "makd.json"}  # fmt: skip
    one, other = AutoModel.from_pretrained(output), AutoModel.from_pretrained(student)
    assert not factored_linears(one)
    ids = torch.arange(20).reshape(2, 10)
    torch.testing.assert_close(one(ids)[0], other(ids)[0], rtol=1e-4, atol=1e-5)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["fingerprint"] == makd.fingerprint(load_model(str(output)))
    assert metrics["params"]["total"]["student"] == sum(p.numel() for p in one.parameters())
    assert "latency_ms" not in metrics
    added = metrics["params"]["total"]["student"] - sum(p.numel() for p in other.parameters())
    assert f"adds {added:,} parameters" in out
    assert f"{metrics['params']['total']['student']:,} (" in (output / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(output)("text")["input_ids"]


@pytest.fixture
def folded(timed, encoder_folder, tmp_path, slow_factors):
    """A student whose forwards were timed when it was made, with all linears dense again."""
    return makd.bench(str(timed), str(encoder_folder), SETTINGS, fold=True, output=tmp_path / "faster").folder


@pytest.fixture
def timed(made, tmp_path):
    """A student with a card that its owner wrote in."""
    folder = shutil.copytree(made, tmp_path / "timed")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMy own notes.\n")
    return folder


class TestTheCardAndTheReportOfAFoldedStudent:
    def test_say_nothing_of_forwards_that_are_no_more_its_own(self, timed, folded):
        assert "Latency: median of forwards" in (timed / "README.md").read_text()
        card, metrics = (folded / "README.md").read_text(), json.loads((folded / "metrics.json").read_text())
        assert "Latency: median" not in card
        assert not {"latency_ms", "latency_tokens"} & metrics.keys()
        assert "\nMy own notes.\n" in card

    def test_say_what_was_folded_and_what_the_recipe_repeats(self, folded, encoder_folder):
        names = json.loads((folded / "metrics.json").read_text())["folded"]
        assert sorted(names) == sorted(makd.resolve(AutoModel.from_pretrained(encoder_folder)).linears)
        card = (folded / "README.md").read_text()
        assert "12 of them dense again where that is faster" in card
        assert "--config recipe.yaml --output ANOTHER` repeats the run before `makd bench --fold`." in card
        assert 'AutoModel.from_pretrained("faster")' in card

    def test_blame_no_older_makd_for_what_was_left_out(self, folded):
        text = write_report([folded]).read_text(encoding="utf-8")
        assert "a makd that did not keep it" not in text
        assert "`makd bench --fold` made 12 linears dense again" in text


def test_nothing_to_fold_saves_the_same_student(student, encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "FOLD_FROM", float("inf"))
    report = makd.bench(str(student), str(encoder_folder), SETTINGS, fold=True, output=tmp_path / "same", card=False)
    assert report.speed.added_parameters == 0
    assert makd.fingerprint(load_model(str(tmp_path / "same"))) == makd.fingerprint(load_model(str(student)))
    assert not (student / "bench.json").exists()
    assert (tmp_path / "same" / "report" / "linears.json").is_file()
    assert "folded" not in json.loads((tmp_path / "same" / "metrics.json").read_text())


def test_weights_keep_their_dtype_whatever_the_bench_is_in(student, encoder_folder, tmp_path, slow_factors):
    settings = makd.BenchConfig(batches=(1,), lengths=(8,), repeats=1, dtype="bfloat16")
    makd.bench(str(student), str(encoder_folder), settings, fold=True, output=tmp_path / "faster")
    assert AutoModel.from_pretrained(tmp_path / "faster").dtype == torch.float32


def test_models_in_hand_are_timed_and_folded(student, encoder_folder, tmp_path, slow_factors):
    ours, theirs = AutoModel.from_pretrained(student), AutoModel.from_pretrained(encoder_folder)
    report = makd.bench(ours, theirs, SETTINGS, fold=True, output=tmp_path / "faster")
    assert report.card is None
    assert not factored_linears(AutoModel.from_pretrained(report.folder))
    assert factored_linears(ours)
    with pytest.raises(makd.MakdError, match="in hand is bfloat16"):
        makd.bench(ours.bfloat16(), theirs, SETTINGS)


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--batches", "[0]"], "batches is one or more whole numbers, each at least 1; got [0]"),
        (["--lengths", "[65]"], "BertModel, which has 64. Give lengths up to 64"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "toaster"], "device 'toaster' is not there"),
        (["--dtype", "float8"], "float32, bfloat16, float16"),
        (["--fold"], "--fold --output FOLDER"),
        (["--output", "{there}"], "--fold --output FOLDER"),
        (["--fold", "--output", "{student}", "--overwrite"], "which this run reads"),
        (["--fold", "--output", "{there}"], "not empty"),
        (["--head", "hed"], "Unknown head 'hed'"),
    ],
)
def test_settings_that_are_not_allowed_change_nothing_on_disk(run, student, encoder_folder, tmp_path, flags, hint):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").write_text("precious")
    flags = [flag.format(there=tmp_path / "there", student=student) for flag in flags]
    before = {path.name: path.read_bytes() for path in student.iterdir() if path.is_file()}
    code, _, err = run("bench", student, "--teacher", encoder_folder, *flags)
    assert code == 2, err
    assert hint in err
    assert "Traceback" not in err
    assert {path.name: path.read_bytes() for path in student.iterdir() if path.is_file()} == before
    assert (tmp_path / "there" / "thesis.txt").read_text() == "precious"


def test_pairs_that_do_not_fit(run, student, encoder_folder, decoder_folder):
    assert "another teacher's student" in run("bench", student, "--teacher", decoder_folder, *QUICK)[2]
    assert "no factored linears" in run("bench", encoder_folder, "--teacher", encoder_folder, *QUICK)[2]
    assert "does not exist" in run("bench", student / "nowhere" / "x", "--teacher", encoder_folder, *QUICK)[2]


@pytest.mark.parametrize("idle", [{"data": "pydoc"}, {"tokenizer": "words"}])
def test_what_is_read_for_formats_alone_is_refused_without_any(idle):
    with pytest.raises(makd.MakdError, match=f"{next(iter(idle))} is for the formats .* none is asked for"):
        makd.bench("student", "teacher", makd.BenchConfig(), **idle)
