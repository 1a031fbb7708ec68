"""What a run keeps beside its student for a report: the same files for every kind of run, and no text unasked."""

import json
import logging

import numpy as np
import pytest
import torch

import makd
from makd.pipeline import compress, distill, factorize_only
from makd.ranks.curves import thin
from makd.run_files import ABOUT, FOLDER, FORMAT
from makd.run_folder import noting_warnings
from makd.run_folder.manifest import foreign_files
from makd.solvers.factors import Spectrum
from tests.report.made_up import files

DATA = makd.DataConfig(path="pydoc", max_length=32, rows=120)
BUDGET = makd.Budget(keep_linears=0.6)


def recipe(samples=2, **training):
    return makd.Recipe(
        training=makd.TrainingConfig(**{"steps": 4, "batch_size": 4, "log_every": 1, **training}),
        calibration=makd.CalibrationConfig(rows=40),
        evaluation=makd.EvaluationConfig(rows=24, latency=False, samples=samples),
    )


def read(folder):
    return {name: json.loads((folder / FOLDER / name).read_text(encoding="utf-8")) for name in ABOUT}


@pytest.fixture(scope="module")
def run(encoder_folder, tmp_path_factory):
    """A whole run, and its files."""
    folder = tmp_path_factory.mktemp("runs") / "student"
    compress(str(encoder_folder), DATA, BUDGET, recipe(), folder)
    return folder


@pytest.fixture(scope="module")
def found(run):
    return read(run)


class TestAWholeRun:
    def test_leaves_every_file_with_its_format_and_what_it_is(self, found):
        assert {(one["format"], one["about"]) for one in found.values()} == {(FORMAT, told) for told in ABOUT.values()}
        assert not [name for name, one in found.items() if "missing" in one]

    def test_has_the_keys_that_made_up_runs_have(self, found):
        def keys(content, place=""):
            if isinstance(content, list):
                return set().union(*(keys(one, f"{place}[]") for one in content[:1])) if content else set()
            if not isinstance(content, dict) or place.endswith((".weights", ".off", ".dropped", ".fallback")):
                return {place}
            return set().union({place}, *(keys(one, f"{place}.{key}") for key, one in content.items()))

        made_up = files(layers=2)
        for name in ("linears.json", "spectra.json", "layers.json"):
            wanted = {key for key in keys(made_up[name])}
            assert wanted <= keys(found[name]), name

    def test_tells_of_every_linear_what_it_became(self, run, found, encoder_folder):
        student = makd.resolve(model := load(run))
        rows = found["linears.json"]["linears"]
        assert [row["name"] for row in rows] == list(student.linears)
        for row in rows:
            module = model.get_submodule(row["name"])
            assert row["rank"] == getattr(module, "rank", None)
            assert (row["out_features"], row["in_features"]) == (module.out_features, module.in_features)
            assert (row["rank"] is None) == (row["why_dense"] is not None)
            assert row["measured_error"].keys() == {"before", "after"}
        assert rows[0]["break_even"] == 15  # (32 * 32 - 1) // 64

    def test_logs_every_step_with_every_aspect(self, found):
        (training,) = found["training.json"]["trainings"]
        losses = [entry for entry in training["log"] if "loss" in entry]
        assert [entry["step"] for entry in losses] == [1, 2, 3, 4]
        for entry in losses:
            weighted = sum(weight * entry[name] for name, weight in training["weights"].items())
            assert entry["loss"] == pytest.approx(weighted, rel=1e-3)
        assert "logits" in training["off"]

    def test_shows_neighbours_of_as_many_texts_as_were_asked_for(self, found):
        samples = found["samples.json"]
        assert samples["kind"] == "neighbours"
        assert len(samples["rows"]) == 2
        assert 0 <= samples["kept"] <= 1

    def test_holds_nothing_that_makd_does_not_know_as_its_own(self, run):
        assert foreign_files(run) == []
        (run / "report.html").write_text("a report")
        assert foreign_files(run) == []
        manifest = (run / "makd.json").read_text()
        (run / "makd.json").unlink()  # as a makd without it left it
        assert foreign_files(run) == []
        (run / "makd.json").write_text(manifest)
        (run / "report.html").unlink()

    def test_text_of_the_data_is_in_one_file_alone_and_not_in_the_card(self, run, found):
        text = found["samples.json"]["rows"][0]["text"][:40]
        holds = [path.name for path in run.rglob("*.json") if text in json.dumps(path.read_text())]
        assert text not in (run / "README.md").read_text()
        assert {"linears.json", "layers.json", "training.json"}.isdisjoint(holds)


def load(folder):
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder)


def test_looking_changes_no_student(run, encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("makd.run.Run.look_inside", lambda *_: None)
    monkeypatch.setattr("makd.run.Run.take_samples", lambda *_: None)
    without = compress(str(encoder_folder), DATA, BUDGET, recipe(), tmp_path / "without").metrics["fingerprint"]
    assert json.loads((run / "metrics.json").read_text())["fingerprint"] == without


def test_a_start_says_that_it_was_not_trained_and_that_no_text_was_kept(encoder_folder, tmp_path):
    factorize_only(str(encoder_folder), DATA, BUDGET, recipe(samples=0), tmp_path / "start")
    found = read(tmp_path / "start")
    assert found["training.json"]["missing"] == "the student was not trained in this run"
    assert "samples is 0" in found["samples.json"]["missing"]
    assert found["layers.json"].keys() == {"format", "about", "after"}


def test_a_student_that_is_taught_further_keeps_what_was_said_when_it_was_made(run, found, encoder_folder, tmp_path):
    distill(str(run), str(encoder_folder), DATA, recipe(), tmp_path / "taught")
    taught = read(tmp_path / "taught")
    assert taught["spectra.json"] == found["spectra.json"]
    for row, before in zip(taught["linears.json"]["linears"], found["linears.json"]["linears"], strict=True):
        assert row["predicted_error"] == before["predicted_error"]
        assert row["measured_error"]["before"] == pytest.approx(before["measured_error"]["after"], rel=1e-3)


def test_a_streamed_student_says_that_it_was_never_compared(encoder_folder, tmp_path):
    makd.factorize_streamed(str(encoder_folder), DATA, BUDGET, recipe(), tmp_path / "streamed")
    found = read(tmp_path / "streamed")
    for name in ("layers.json", "samples.json"):
        assert "streamed" in found[name]["missing"]
    assert "streamed" in found["linears.json"]["not_measured"]
    assert len(found["spectra.json"]["curves"]) >= 8


def test_a_decoder_writes_on_from_held_out_prompts(decoder_folder, tmp_path):
    compress(str(decoder_folder), DATA, BUDGET, recipe(steps=2), tmp_path / "student")
    samples = read(tmp_path / "student")["samples.json"]
    assert samples["kind"] == "continuations"
    assert [row.keys() for row in samples["rows"]] == [{"prompt", "teacher", "student"}] * 2
    assert all(row["prompt"] and row["teacher"] for row in samples["rows"])


def test_the_log_of_a_run_that_was_gone_on_with_is_whole(encoder_folder, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    settings = recipe(save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr("makd.pipeline._finish", stop)
        with pytest.raises(Stopped):
            compress(str(encoder_folder), DATA, BUDGET, settings, tmp_path / "student")
    compress(str(encoder_folder), DATA, BUDGET, settings, tmp_path / "student", resume=True)
    (training,) = read(tmp_path / "student")["training.json"]["trainings"]
    assert [entry["step"] for entry in training["log"] if "loss" in entry] == [1, 2, 3, 4]


class TestCurves:
    def test_errors_are_the_energy_of_the_terms_left_out(self):
        values = np.sort(np.random.default_rng(0).exponential(size=500))[::-1]
        curve = thin("a", Spectrum(torch.tensor(values.copy())), wanted=[123])
        assert 123 in curve.ranks
        assert curve.ranks[0] == 1
        assert curve.ranks[-1] == curve.terms == 500
        assert len(curve.ranks) <= 49
        energy = values**2
        for rank, value, error in zip(curve.ranks, curve.singular_values, curve.errors, strict=True):
            assert value == pytest.approx(values[rank - 1])
            assert error == pytest.approx(energy[rank:].sum() / energy.sum(), abs=1e-12)


def test_a_warning_is_noted_once_with_how_often_it_came():
    logger = logging.getLogger("makd.some.part")
    with noting_warnings() as noted:
        logger.warning("mind %s", "this")
        logger.warning("mind this")
        logger.info("not that")
    logger.warning("too late")
    assert noted.rows() == [{"level": "warning", "text": "mind this", "times": 2}]
