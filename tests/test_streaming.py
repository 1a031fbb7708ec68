"""`makd factorize --stream` as a user meets it: the student of the path in memory, and clear early errors."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import makd
from makd.calibration.store import DiskStore
from makd.cli.main import main
from makd.run_folder import OutputFolder

QUICK = [
    "--data.path", "pydoc", "--data.rows", "40", "--data.max_length", "16", "--recipe.calibration.rows", "16",
    "--recipe.evaluation.rows", "8",
    "--recipe.evaluation.latency", "false", "--recipe.device", "cpu",
]  # fmt: skip
WHITENED = ["--recipe.factorize.solver", "whitened"]
SVD = ["--recipe.factorize.solver", "svd"]


@pytest.fixture
def stream(run):
    """Run `makd factorize ...` in this process; gives (exit code, stdout, stderr)."""

    def runner(teacher, output, *more, stream=True):
        words = ["factorize", "--teacher", teacher, "--budget.keep_linears", "0.5", "--output", output, *QUICK, *more]
        return run(*words, *(["--stream"] if stream else []))

    return runner


@pytest.mark.parametrize(
    "flags", [[], [*WHITENED, "--recipe.factorize.ranks", "global"], SVD], ids=["auto", "whitened", "svd"]
)
def test_the_folder_is_that_of_the_path_in_memory(stream, decoder_folder, tmp_path, flags):
    code, _, err = stream(decoder_folder, tmp_path / "memory", *flags, stream=False)
    assert code == 0, err
    code, out, err = stream(decoder_folder, tmp_path / "stream", *flags)
    assert code == 0, err
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("memory", "stream")]
    assert names[0] == names[1]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("memory", "stream")]
    for config in configs:  # who rounds otherwise in the last bit is another student
        del config["quantization_config"]["identity"]
    assert configs[0] == configs[1]
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "memory" / name).read_text() == (tmp_path / "stream" / name).read_text(), name
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "stream"))
    assert one.keys() == two.keys()
    for name in one:
        if one[name].is_floating_point():
            torch.testing.assert_close(one[name], two[name])
    metrics, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("stream", "memory"))
    assert metrics["params"] == theirs["params"]
    assert metrics["bytes"] == theirs["bytes"]
    assert metrics["memory"]["peak_bytes"] > 0
    assert (
        metrics["tokens"].get("calibration")
        == theirs["tokens"].get("calibration")
        == (256 if flags is not SVD else None)
    )
    assert "fidelity" not in metrics
    assert f"{metrics['params']['total']['student']:,}" in out
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "stream")
    assert sum(parameter.numel() for parameter in student.parameters()) == metrics["params"]["total"]["student"]
    assert AutoTokenizer.from_pretrained(tmp_path / "stream").eos_token == "[SEP]"
    assert not (tmp_path / ".stream.makd").exists()


def test_its_metrics_are_those_of_the_path_in_memory_but_for_what_is_measured(stream, decoder_folder, tmp_path):
    flags = [*WHITENED, "--recipe.factorize.share_input", "always"]
    flags += ["--recipe.layerwise.steps", "2", "--recipe.calibration.batch_size", "8"]
    for name in ("memory", "stream"):
        code, _, err = stream(decoder_folder, tmp_path / name, *flags, stream=name == "stream")
        assert code == 0, err
    metrics, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("stream", "memory"))
    measured = {"fidelity", "perplexity", "fingerprint", "measured_on"}
    assert metrics.keys() - {"memory"} == theirs.keys() - measured
    for name in ("params", "bytes", "shared_inputs", "layerwise"):
        assert metrics[name] == theirs[name], name
    assert metrics["tokens"] == {**theirs["tokens"], "evaluation": 0}
    assert metrics["tokens"]["layerwise"] > 0


def test_the_written_recipe_repeats_the_run(stream, decoder_folder, tmp_path):
    assert stream(decoder_folder, tmp_path / "one", *WHITENED)[0] == 0
    assert yaml.safe_load((tmp_path / "one" / "recipe.yaml").read_text())["stream"] is True
    words = ["factorize", "--config", tmp_path / "one" / "recipe.yaml", "--output", tmp_path / "two"]
    assert main([str(word) for word in words]) == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    assert "memory" in json.loads((tmp_path / "two" / "metrics.json").read_text())


def test_python_and_the_command_line_are_the_same(stream, encoder_folder, tmp_path):
    assert stream(encoder_folder, tmp_path / "one", *WHITENED)[0] == 0
    recipe = makd.Recipe(
        calibration=makd.CalibrationConfig(rows=16), factorize=makd.FactorizeConfig(solver="whitened"), device="cpu"
    )
    data = makd.DataConfig(path="pydoc", rows=40, max_length=16)
    report = makd.factorize_streamed(str(encoder_folder), data, makd.Budget(keep_linears=0.5), recipe, tmp_path / "two")
    assert report.folder == tmp_path / "two"
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


KILLED = """
import os, signal, sys
from makd.cli.main import main
from makd.run_folder import OutputFolder
from makd.calibration.store import DiskStore
write = DiskStore.write
def dies_in_the_second_layer(self, entry, *arguments):
    if entry.startswith("spectra/model.layers.1."):
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, entry, *arguments)
DiskStore.write = dies_in_the_second_layer
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_where_it_was(stream, decoder_folder, tmp_path, monkeypatch):
    words = ["factorize", "--stream", "--teacher", decoder_folder, "--budget.keep_linears", "0.5", "--output",
             tmp_path / "cut", *QUICK, *SVD]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    assert (
        len(
            list(
                (tmp_path / ".cut.makd" / "factorization" / "svd-2" / "spectra").glob("*layers.0*down_proj.safetensors")
            )
        )
        == 1
    )
    code, _, err = stream(decoder_folder, tmp_path / "cut", *WHITENED)
    assert code == 2
    assert "its factorize.solver is svd, this one's is whitened" in err
    assert stream(decoder_folder, tmp_path / "whole", *SVD)[0] == 0
    write, written = DiskStore.write, []

    def noted(self, entry, *arguments):
        written.append(entry)
        write(self, entry, *arguments)

    monkeypatch.setattr(DiskStore, "write", noted)
    assert stream(decoder_folder, tmp_path / "cut", *SVD)[0] == 0
    assert any("layers.1." in entry for entry in written)
    assert not any("layers.0." in entry for entry in written)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


def test_a_killed_run_is_not_gone_on_with_when_the_teachers_config_was_mended(stream, decoder_folder, tmp_path):
    teacher = shutil.copytree(decoder_folder, tmp_path / "teacher")
    words = ["factorize", "--stream", "--teacher", teacher, "--budget.keep_linears", "0.5", "--output",
             tmp_path / "cut", *QUICK, *SVD]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, words)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    code, _, err = stream(teacher, tmp_path / "cut", *SVD)
    assert code == 2
    assert "holds the unfinished work of another run: its teacher's config is" in err


def test_svd_needs_neither_text_nor_tokenizer(stream, decoder_folder, tmp_path):
    shutil.copytree(decoder_folder, tmp_path / "teacher", ignore=shutil.ignore_patterns("token*"))
    code, _, err = stream(tmp_path / "teacher", tmp_path / "student", *SVD, "--data.path", "./nowhere")
    assert code == 0, err
    assert "The student gets no tokenizer" in err
    code, _, err = stream(tmp_path / "teacher", tmp_path / "other", *WHITENED)
    assert code == 2
    assert "no tokenizer" in err


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--recipe.factorize.vocabulary", "factored"], "Factored vocabularies and dropped layers cannot be streamed"),
        (["--recipe.factorize.store", "memory"], "leave factorize.store at auto"),
        ([*SVD, "--budget.keep_linears", "2"], "keep_linears"),
        ([*SVD, "--budget.keep_linears", "null", "--budget.params", "100"], "smallest possible student"),
        ([*WHITENED, "--data.path", "./nowhere"], "./nowhere does not exist"),
        ([*SVD, "--tokenizer", "./nowhere"], "./nowhere does not exist"),
        ([*SVD, "--recipe.device", "cuda:99"], "cuda:99"),
    ],
)
def test_settings_that_are_not_allowed(stream, decoder_folder, tmp_path, flags, hint):
    code, _, err = stream(decoder_folder, tmp_path / "student", *flags)
    assert code == 2, err
    assert hint in err
    assert "Traceback" not in err
    assert not (tmp_path / "student").exists()


def test_teachers_that_cannot_be_streamed(stream, decoder_folder, tmp_path):
    pickles = tmp_path / "pickles"
    shutil.copytree(decoder_folder, pickles)
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    cases = {
        tmp_path / "nowhere": "does not exist",
        pickles: "pytorch_model.bin and no safetensors",
        tmp_path / "model.gguf": "only safetensors can be streamed",
        "some-org/no-such-model": "No model could be loaded",
    }
    for teacher, hint in cases.items():
        code, _, err = stream(teacher, tmp_path / "student", *SVD)
        assert code == 2, (teacher, err)
        assert hint in err
        assert not (tmp_path / "student").exists()


def test_an_output_that_is_not_empty_and_checkpoints_of_a_training_are_kept(stream, decoder_folder, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "thesis.txt").write_text("precious")
    code, _, err = stream(decoder_folder, tmp_path / "student", *SVD)
    assert code == 2
    assert "not empty" in err
    code, _, err = stream(decoder_folder, tmp_path / "student", *SVD, "--overwrite")
    assert code == 2
    assert "holds more than an output of makd: thesis.txt" in err
    assert (tmp_path / "student" / "thesis.txt").read_text() == "precious"
    with OutputFolder(tmp_path / "taught") as training:
        training.checkpoints.mkdir()
        (training.checkpoints / "checkpoint-1").mkdir()
    code, _, err = stream(decoder_folder, tmp_path / "taught", *SVD)
    assert code == 2
    assert "the unfinished work of another command: checkpoints" in err
    assert training.checkpoints.is_dir()
