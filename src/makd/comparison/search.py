"""Station 10: hyper-parameters by random search, as many trials for every method, on training rows alone.

Bergstra & Bengio (2012): with few trials drawing at random is hard to beat, and model-based searches draw at random for
their first ten. A trial teaches a student on a part of the training rows and scores it on the rest; the validation rows
are not looked at. It is at the first seed and the first budget, for each task and method; what it finds holds for all.
"""

import dataclasses
import logging
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from makd.baselines import Baseline, Choice, Span
from makd.comparison.cells import Cell, cell_hash
from makd.comparison.ground import Ground
from makd.comparison.results import append_line, read_lines
from makd.comparison.settings import Experiment
from makd.comparison.teach import teach
from makd.errors import SettingError
from makd.pipeline import Progress
from makd.tasks import Task

logger = logging.getLogger(__name__)

SEARCH_FILE = "search.jsonl"
"""In the output folder: a line for each trial."""

Found = dict[str, Any]
"""Hyper-parameter -> value."""


def find_settings(experiment: Experiment, cell: Cell, ground: Ground, progress: Progress) -> Found:
    """The best hyper-parameters of the trials, those that are on disk included; {} without a search.

    Args:
        experiment: says how many trials.
        cell: with the first seed and the first budget of the experiment.
        ground: of that cell.
        progress: told of every step.

    Raises:
        SettingError: question answering, whose training rows cannot be scored.
    """
    search = experiment.search
    if not search.trials:
        return {}
    path, identity = Path(experiment.output) / SEARCH_FILE, cell_hash(experiment, cell)
    done = {line["trial"]: line for line in read_lines(path) if line["hash"] == identity}
    measured = split_training(ground.task, search.held_out, cell.seed)
    training = cell.method.lengthened(experiment.training)
    if search.steps is not None:
        training = replace(training, steps=search.steps)
    for trial in range(search.trials):
        if trial in done:
            continue
        drawn = draw(cell, trial)
        taught = teach(ground, cell.method.build(**drawn), cell.budget, training, cell.seed, progress, measured)
        done[trial] = {
            "task": cell.names["task"], "method": cell.method.name, "trial": trial, "score": taught.scores["score"],
            "settings": drawn, "seconds": sum(taught.seconds.values()), "hash": identity,
        }  # fmt: skip
        append_line(path, done[trial])
        logger.info("trial %d of %s: %.4f with %s", trial, cell, taught.scores["score"], drawn or "its own settings")
    best = max((done[trial] for trial in range(search.trials)), key=lambda line: float(line["score"]))
    return dict(best["settings"])


def draw(cell: Cell, trial: int) -> Found:
    """Settings of a trial; of the first one none, so that the method's own are tried."""
    if trial == 0:
        return {}
    generator = np.random.default_rng([cell.seed, trial, zlib.crc32(cell.method.kind.encode())])
    space: Baseline = cell.method.build()
    found: Found = {}
    for name, allowed in space.search.items():
        found[name] = _value(allowed, generator)  # drawn even if it is not used: the others stay the same
    return {name: value for name, value in found.items() if name not in cell.method.settings}


def _value(allowed: Span | Choice, generator: np.random.Generator) -> Any:
    if isinstance(allowed, Choice):
        return allowed.values[int(generator.integers(len(allowed.values)))]
    share = float(generator.random())
    if allowed.is_logarithmic:
        return float(f"{allowed.low * (allowed.high / allowed.low) ** share:.4g}")
    return float(f"{allowed.low + share * (allowed.high - allowed.low):.4g}")


def split_training(task: Task, held_out: float, seed: int) -> Task:
    """The task on its training rows alone: some to be taught, the rest to be measured on.

    Raises:
        SettingError: question answering.
    """
    if task.config.known.kind == "question_answering":
        raise SettingError(
            "A search scores its trials on training rows, which question answering has as windows without answers' "
            "texts. Take search.trials 0, and give the methods their settings."
        )
    halves = task.train.train_test_split(test_size=held_out, seed=seed)
    return dataclasses.replace(task, train=halves["train"], evaluation={"training": halves["test"]})


def describe(found: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"{name} {value}" for name, value in found.items())
