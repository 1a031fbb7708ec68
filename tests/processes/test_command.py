"""`torchrun --nproc-per-node 2 -m makd …`: one student, one folder, one set of lines; and what ends all."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from makd.cli.main import main
from tests.processes.starting import begin, end, wait_for, workers_of

STEPS = 40
EXPERIMENT = Path(__file__).parents[2] / "examples" / "encoder" / "experiment.yaml"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def words(teacher, output, **training):
    settings = {"steps": STEPS, "log_every": 10, "batch_size": 4, "save_every": 5, **training}
    return [
        "compress", "--teacher", teacher, "--output", output, "--budget.keep_linears", 0.5, "--data.path", "pydoc",
        "--data.max_length", 16, "--recipe.calibration.rows", 16, "--recipe.evaluation.rows", 8,
        "--recipe.evaluation.latency", "false", "--recipe.device", "cpu",
        *(word for name, value in training_words(settings) for word in (name, value)),
    ]  # fmt: skip


def training_words(settings):
    return [(f"--recipe.training.{name}", value) for name, value in settings.items()]


def weights(folder):
    return AutoModel.from_pretrained(folder).state_dict()


def difference(ours, theirs):
    """The largest, relative to the tensor that it is in."""
    assert ours.keys() == theirs.keys()
    apart = [
        float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-12))
        for name in theirs
        if theirs[name].is_floating_point()
    ]
    return max(apart)


@pytest.fixture(scope="module")
def of_two(encoder_folder, tmp_path_factory):
    """A run in two processes: its folder, and what it printed."""
    output = tmp_path_factory.mktemp("two") / "student"
    code, out, err = end(begin("-m", "makd", *words(encoder_folder, output)))
    assert code == 0, err
    return output, out, err


@pytest.fixture(scope="module")
def of_one(encoder_folder, tmp_path_factory):
    """The student of one process that accumulates the batches that two have."""
    output = tmp_path_factory.mktemp("one") / "student"
    assert main([str(word) for word in words(encoder_folder, output, accumulate=2)]) == 0
    return output


@pytest.fixture(scope="module")
def killed(encoder_folder, tmp_path_factory):
    """A run whose second process was killed: folder of the runs, exit code, stderr, seconds that it took to end."""
    output = tmp_path_factory.mktemp("killed") / "student"
    started = begin("-m", "makd", *words(encoder_folder, output))
    wait_for(output.parent / ".student.makd" / "checkpoints" / "checkpoint-10" / "whole.json", started)
    os.kill(workers_of(started)[1], signal.SIGKILL)
    begun = time.monotonic()
    code, _, err = end(started)
    return output.parent, code, err, time.monotonic() - begun


class TestARunInTwoProcesses:
    def test_gives_the_student_of_one_process_at_the_same_global_batch(self, of_two, of_one):
        assert difference(weights(of_two[0]), weights(of_one)) < 1e-3

    def test_leaves_the_files_of_one_process_and_nothing_beside_them(self, of_two, of_one):
        assert sorted(path.name for path in of_two[0].iterdir()) == sorted(path.name for path in of_one.iterdir())
        assert [path.name for path in of_two[0].parent.iterdir()] == ["student"]

    def test_measures_what_one_process_measures(self, of_two, of_one):
        two, one = (json.loads((folder / "metrics.json").read_text()) for folder in (of_two[0], of_one))
        assert two["bytes"] == one["bytes"]
        assert two["params"] == one["params"]
        assert two["tokens"] == one["tokens"]
        assert two["fidelity"]["after"]["cosine"] == pytest.approx(one["fidelity"]["after"]["cosine"], abs=1e-3)

    def test_prints_every_line_once(self, of_two):
        _, out, err = of_two
        assert out.count("before training") == 1
        assert out.count("seconds: ") == 1
        assert err.count(f"distil: 0/{STEPS} steps, begins") == 1
        assert err.count(f"distil: {STEPS}/{STEPS} steps, done") == 1
        assert err.count("aspect task is off") == 1
        assert "[rank1]" not in err
        assert "destroy_process_group" not in err


@pytest.mark.slow
class TestAProcessThatIsKilled:
    def test_ends_the_run_soon_and_with_a_message(self, killed):
        _, code, err, seconds = killed
        assert code != 0
        assert seconds < 60
        assert "Signal 9 (SIGKILL)" in err
        assert "makd: " in err

    def test_leaves_the_checkpoints_and_says_how_to_go_on(self, killed):
        _, _, err, _ = killed
        assert "the same command with --resume goes on" in " ".join(err.split())
        assert "Traceback" not in err.partition("torch/distributed/elastic")[0]

    def test_is_made_good_by_resuming(self, killed, encoder_folder, of_two, tmp_path):
        output = shutil.copytree(killed[0], tmp_path / "runs") / "student"
        code, _, err = end(begin("-m", "makd", *words(encoder_folder, output), "--resume"))
        assert code == 0, err
        assert err.count("going on from checkpoint-") == 1
        ours, theirs = weights(output), weights(of_two[0])
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_is_gone_on_with_by_one_process_that_accumulates_more(self, killed, encoder_folder, of_two, tmp_path):
        output = shutil.copytree(killed[0], tmp_path / "runs") / "student"
        given = [*words(encoder_folder, output, accumulate=2), "--resume"]
        assert main([str(word) for word in given]) == 0
        assert difference(weights(output), weights(of_two[0])) < 1e-3

    def test_cannot_be_gone_on_with_at_another_global_batch(self, killed, encoder_folder, tmp_path, run):
        output = shutil.copytree(killed[0], tmp_path / "runs") / "student"
        code, _, err = run(*words(encoder_folder, output), "--resume")
        assert code == 2
        assert "training.accumulate was 2, is 1" in err


@pytest.mark.slow
def test_the_first_process_killed_ends_the_others(encoder_folder, tmp_path):
    started = begin("-m", "makd", *words(encoder_folder, tmp_path / "student", steps=100_000))
    wait_for(tmp_path / ".student.makd" / "checkpoints" / "checkpoint-5" / "whole.json", started)
    first, second = workers_of(started)
    os.kill(first, signal.SIGKILL)
    begun = time.monotonic()
    code, _, err = end(started)
    assert code != 0
    assert time.monotonic() - begun < 60
    assert "Signal 9 (SIGKILL)" in err
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--recipe.training.steps", "many"], "recipe.training.steps is a whole number"),
        (["--teacher", "./nowhere"], "./nowhere does not exist"),
    ],
    ids=["read by every process", "met by the first"],
)
def test_what_is_refused_is_told_once(encoder_folder, tmp_path, more, told):
    begun = time.monotonic()
    code, out, err = end(begin("-m", "makd", *words(encoder_folder, tmp_path / "student"), *more))
    assert code != 0
    assert out == ""
    lines = " ".join(err.partition("torch/distributed/elastic")[0].split())
    assert lines.count("loading libraries") == 1
    assert lines.count(told) == 1
    assert "Traceback" not in lines
    assert time.monotonic() - begun < 60
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [["bench", "x", "--teacher", "y"], ["demo", "minilm"], ["compare", EXPERIMENT]],
    ids=["bench", "demo", "compare"],
)
def test_what_one_process_does_is_refused_to_several(command, run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, _, err = run(*command)
    assert code == 2
    assert "was started 2 times" in err
