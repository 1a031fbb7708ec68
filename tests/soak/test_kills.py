"""Runs that are killed at random moments and gone on with give what an unstopped run gives, and touch nothing foreign.

Left out of ordinary test runs: `make soak`.
"""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.models import tiny
from tests.soak.jobs import PRELOADED, run

pytestmark = pytest.mark.soak

KILLS = 11
"""Of each command: with six commands, 66."""
PATIENCE = 240
"""Seconds that a run may take, on a machine with other work."""
FOREIGN = ("student.old/thesis.txt", "student.partial/a/b.txt", ".student/notes.txt", "student.makd", "student.txt")


@pytest.fixture(scope="module")
def server():
    """Processes are forked from one that has imported makd and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer):
    """A teacher, a base model, texts and a task."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, head in (("teacher", "base"), ("base", "base")):
        tiny("bert", head, vocab_size=300).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    kinds = ("list", "class", "sequence", "name")
    texts = [f"The {kind} number {index} is a {other}." for index in range(15) for kind in kinds for other in kinds]
    (folder / "texts.txt").write_text("\n".join(texts))
    rows = [f"a good {kind} {index},1\na bad {kind} {index},0\n" for index in range(12) for kind in kinds]
    (folder / "reviews.csv").write_text("text,label\n" + "".join(rows))
    experiment = {
        "teacher": str(folder / "base"),
        "tasks": [{"name": "classification", "path": str(folder / "reviews.csv"), "max_length": 16}],
        "methods": [{"name": "low_rank_svd"}, {"name": "makd_paper"}],
        "budgets": [{"keep_linears": 0.5}],
        "seeds": [1, 2],
        "output": "given by a flag",
        "training": {"steps": 3, "batch_size": 4},
        "finetune": {"training": {"steps": 3, "batch_size": 4}},
        "calibration": {"rows": 8},
        "cache": {},
        "latency": False,
        "device": "cpu",
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    return folder


@dataclass(frozen=True)
class Job:
    """A command that is killed."""

    words: str
    """With {inputs} and {output}."""
    resumes: bool = False
    """Whether it is gone on with by a flag."""


TRAINING = (
    "--recipe.training.steps 12 --recipe.training.save_every 1 --recipe.training.batch_size 4 --recipe.device cpu "
)
QUICK = "--recipe.calibration.rows 16 --recipe.evaluation.rows 8 --recipe.evaluation.latency false "
TEXT = "--teacher {inputs}/teacher --output {output} --data.path {inputs}/texts.txt --data.max_length 16 "
JOBS = {
    "compress": Job("compress --budget.keep_linears 0.5 " + TEXT + TRAINING + QUICK, resumes=True),
    "finetune": Job(
        "finetune {inputs}/base --task classification --task_data {inputs}/reviews.csv --task.max_length 16 "
        "--output {output} " + TRAINING,
        resumes=True,
    ),
    "cache": Job("cache --recipe.device cpu --cache.batch_size 2 " + TEXT),
    "factorize": Job(
        "factorize --budget.keep_linears 0.5 --recipe.device cpu --recipe.factorize.store disk " + TEXT + QUICK
    ),
    "stream": Job("factorize --stream --budget.keep_linears 0.5 --recipe.device cpu " + TEXT + QUICK),
    "compare": Job("compare {inputs}/experiment.yaml --output {output}"),
}


class Runner:
    """One command, run in processes of its own."""

    def __init__(self, server, job, inputs, folder):
        self.server, self.job, self.inputs = server, job, inputs
        self.output, self.log = folder / "student", folder.parent / f"{folder.name}.log"

    def start(self, *flags):
        words = self.job.words.format(inputs=self.inputs, output=self.output).split()
        process = self.server.Process(target=run, args=([*words, *flags], str(self.log)))
        process.start()
        return process

    def finish(self, *flags):
        process = self.start(*flags)
        process.join(PATIENCE)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode, self.log.read_text(errors="replace")

    def go_on(self):
        """To the end, as a person would: with --resume, and without where it is told that there is nothing."""
        code, told = self.finish(*(["--resume"] if self.job.resumes else []))
        if code == 2 and "There is nothing to resume" in told:
            code, told = self.finish()
        assert code == 0, told
        return told

    def kill(self, seconds):
        """Start, or go on, and kill after so many seconds; whether it still ran."""
        has_checkpoints = any((self.output.parent / ".student.makd" / "checkpoints").glob("*/whole.json"))
        process = self.start(*(["--resume"] if self.job.resumes and has_checkpoints else []))
        process.join(seconds)
        is_running = process.exitcode is None
        if is_running:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert is_running or process.exitcode == 0, self.log.read_text(errors="replace")
        return is_running


def result_of(output):
    """What has to be the same: weights and caches bit for bit; of a comparison, every teacher and every student."""
    lines = output / "results.jsonl"
    if lines.is_file():
        found = [json.loads(line) for line in lines.read_text().splitlines()]
        return sorted((str(line["cell"]), line["fingerprint"], line["score"]) for line in found), weights(output)
    return weights(output)


def weights(output):
    return {str(path.relative_to(output)): digest(path) for path in sorted(output.rglob("*.safetensors"))}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def surround(folder):
    """Foreign files beside an output, with names that a careless program might take."""
    for name in FOREIGN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"precious {name}")


def foreign(folder):
    """All files of `folder` but makd's own, with what is in them."""
    own = (folder / "student", folder / ".student.makd")
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): digest(path) for path in files if not any(map(path.is_relative_to, own))}


@pytest.mark.parametrize("name", JOBS)
def test_killed_runs_give_what_an_unstopped_run_gives(server, inputs, tmp_path, name):
    draw, job = random.Random(name), JOBS[name]
    (tmp_path / "whole").mkdir()
    unstopped = Runner(server, job, inputs, tmp_path / "whole")
    unstopped.kill(0)  # the server's imports are not the run's
    start = time.perf_counter()
    unstopped.go_on()
    seconds, wanted = time.perf_counter() - start, result_of(tmp_path / "whole" / "student")
    sources = {path: digest(path) for path in inputs.rglob("*") if path.is_file()}
    kills = number = 0
    while kills < KILLS:
        folder = tmp_path / f"cut_{number}"
        surround(folder)
        before, runner, number = foreign(folder), Runner(server, job, inputs, folder), number + 1
        for _ in range(draw.randint(1, 3)):  # a run that is gone on with may be killed again
            if runner.output.is_dir() and name != "compare":
                break
            kills += runner.kill(draw.uniform(0, 1.05 * seconds))
        if not runner.output.is_dir() or name == "compare":
            runner.go_on()
        assert result_of(runner.output) == wanted, f"{name}, run {number}, {Path(runner.log).read_text()}"
        assert foreign(folder) == before
    assert {path: digest(path) for path in inputs.rglob("*") if path.is_file()} == sources
