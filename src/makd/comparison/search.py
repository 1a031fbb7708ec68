"""Station 10: hyper-parameters by optuna, as many trials for every method, on training rows alone.

The sampler is TPE (Bergstra, Bardenet, Bengio & Kégl 2011, "Algorithms for Hyper-Parameter Optimization", NeurIPS): it
draws at random first, then more often where trials were good than where they were not, be it numbers or names, all
hyper-parameters together. A trial teaches a student on a part of the training rows and scores it on the rest; the
validation rows are not looked at. It is at the first seed and the first budget, for each task and method; what it finds
holds for all. The lines of `search.jsonl` are the study: it is made anew from them before each trial.
"""

import dataclasses
import importlib.util
import logging
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from makd.baselines import Choice, SearchSpace, Span
from makd.comparison.cells import Cell, cell_hash
from makd.comparison.ground import Ground
from makd.comparison.results import append_line, read_lines
from makd.comparison.settings import Experiment, MethodConfig
from makd.comparison.teach import teach
from makd.errors import SettingError
from makd.pipeline import Progress
from makd.tasks import Task

logger = logging.getLogger(__name__)

SEARCH_FILE = "search.jsonl"
"""In the output folder: a line for each trial."""

RANDOM_TRIALS = 4
"""Trials before TPE begins, the method's own settings included; with optuna's 10, 8 trials would be a random search."""

Found = dict[str, Any]
"""Hyper-parameter -> value."""

Trial = dict[str, Any]
"""A line of `search.jsonl`."""


def check_optuna() -> None:
    """Refuse a search that cannot be run.

    Raises:
        SettingError: optuna is not installed.
    """
    if importlib.util.find_spec("optuna") is None:
        raise SettingError(
            "search.trials above 0 needs optuna, which is not installed. `pip install makd[compare]` brings it; "
            "search.trials 0 searches nothing."
        )


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
    search, space = experiment.search, search_space(cell.method)
    if not search.trials or not space:
        return {}
    path, identity = Path(experiment.output) / SEARCH_FILE, cell_hash(experiment, cell)
    done = {line["trial"]: line for line in read_lines(path) if line["hash"] == identity}
    measured = split_training(ground.task, search.held_out, cell.seed)
    training = cell.method.lengthened(experiment.training)
    if search.steps is not None:
        training = replace(training, steps=search.steps)
    trials: list[Trial] = []
    for number in range(search.trials):
        if number not in done:
            found = propose(cell, space, trials)
            taught = teach(ground, cell.method.build(**found), cell.budget, training, cell.seed, progress, measured)
            done[number] = {
                "task": cell.names["task"], "method": cell.method.name, "trial": number,
                "score": taught.scores["score"], "settings": found, "seconds": sum(taught.seconds.values()),
                "hash": identity,
            }  # fmt: skip
            append_line(path, done[number])
            logger.info(
                "trial %d of %s: %.4f with %s", number, cell, done[number]["score"], found or "its own settings"
            )
        trials.append(done[number])
    best = max(trials, key=lambda line: float(line["score"]))  # of equal ones the first: the method's own settings
    return dict(best["settings"])


def search_space(method: MethodConfig) -> SearchSpace:
    """What is searched: the method's space without what its `settings` fix."""
    return {name: allowed for name, allowed in method.build().search.items() if name not in method.settings}


def propose(cell: Cell, space: SearchSpace, past: Sequence[Trial]) -> Found:
    """Settings of the trial after `past`; of the first one none, so that the method's own are tried.

    What is random depends on the cell's seed, its method and the trial's number: a search that was stopped goes on as
    if it had not been. The method's own settings are shown to the sampler if all of them lie in the space; they compete
    in any case.
    """
    if not past:
        return {}
    import optuna

    entropy = [cell.seed, len(past), zlib.crc32(cell.method.kind.encode())]
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution(allowed.values)
        if isinstance(allowed, Choice)
        else optuna.distributions.FloatDistribution(allowed.low, allowed.high, log=allowed.is_logarithmic)
        for name, allowed in space.items()
    }
    own = {name: getattr(cell.method.build(), name) for name in space}
    with _quiet_optuna():
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for line in past:
            tried = {**own, **line["settings"]}
            if all(allowed.holds(tried[name]) for name, allowed in space.items()):
                study.add_trial(
                    optuna.trial.create_trial(params=tried, distributions=distributions, value=line["score"])
                )
        found = study.ask(distributions).params
    return {name: _readable(space[name], found[name]) for name in space}


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Within it optuna does not tell of each study that it makes."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _readable(allowed: Span | Choice, value: Any) -> Any:
    """Numbers of a span with 4 digits, within it."""
    if isinstance(allowed, Choice):
        return value
    return min(max(float(f"{value:.4g}"), allowed.low), allowed.high)


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
