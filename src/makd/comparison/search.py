"""Station 10: hyper-parameters by optuna, as many trials for every method, on training rows alone.

The first trials are a method's own settings and points that are spread over its space (Sobol'). After them comes TPE
(Bergstra, Bardenet, Bengio & Kégl 2011, "Algorithms for Hyper-Parameter Optimization", NeurIPS), which draws more often
where trials were good than where they were not, be it numbers or names. A trial teaches a student on a part of the
training rows and scores it on the rest, which its teacher has not seen either: a student of one that has is the better
for not learning. The rows that cells are measured on, of a split of their own or held out, are not looked at. It is at
the first seed and the first budget, for each method, on each task or on one for all; what it finds holds for all. The
lines of `search.jsonl` are the study: it is made anew from them before each trial.
"""

import importlib.util
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import qmc

from makd.baselines import Choice, SearchSpace, Span
from makd.comparison.cells import Cell, build_method, spaceless_hashes, trial_hash
from makd.comparison.language import LanguageConfig
from makd.comparison.results import append_line, read_lines
from makd.comparison.same_rows import check_trials
from makd.comparison.settings import Experiment, MethodConfig, Subject, short_name
from makd.comparison.setup import Setup
from makd.comparison.teach import teach
from makd.errors import NumericsError, SettingError
from makd.progress import OnProgress

logger = logging.getLogger(__name__)

SEARCH_FILE = "search.jsonl"
"""In the output folder: a line for each trial."""

FIRST_TRIALS = 4
"""Trials before TPE begins, the method's own settings included; with optuna's 10, 8 trials would have none of it."""

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
            "search.trials above 0 needs optuna, which is not installed. `pip install 'makd[compare]'` brings it; "
            "search.trials 0 searches nothing."
        )


def known_settings(experiment: Experiment, cells: Sequence[Cell]) -> dict[str, Found | None]:
    """What a search found for each of `cells`, by its text and by what is on disk; None where trials are missing.

    Of equal trials the first counts, so that the method's own settings win a tie. They are taken, as {}, if no trial
    has a score or there is nothing to search.
    """
    lines = read_lines(Path(experiment.output) / SEARCH_FILE)
    first = {str(cell): searched_at(experiment, cell) for cell in cells}
    best = {str(cell): _best(experiment, cell, lines) for cell in {str(cell): cell for cell in first.values()}.values()}
    return {name: best[str(cell)] for name, cell in first.items()}


def _best(experiment: Experiment, cell: Cell, lines: Sequence[Trial]) -> Found | None:
    trials = read_trials(experiment, cell, lines)
    if len(trials) < trials_of(experiment, cell):
        return None
    scored = [line for line in trials.values() if line["score"] is not None]
    ranked = sorted(scored, key=lambda line: (-float(line["score"]), int(line["trial"])))
    return dict(ranked[0]["settings"]) if ranked else {}


def searched_at(experiment: Experiment, cell: Cell) -> Cell:
    """The cell that the trials have which settle the settings of `cell`: its task holds back some training rows."""
    names = {short_name(task): task for task in experiment.subjects}
    task = cell.task if experiment.search.task is None else names[experiment.search.task]
    budgets = [budget for budget in experiment.budgets if cell.method.is_compared_at(budget)]
    share = experiment.search.held_out
    held_back: Subject = (
        replace(task, held_out=share, other=None, instructions=())
        if isinstance(task, LanguageConfig)
        else replace(task, tuning=share)
    )
    return replace(cell, task=held_back, seed=experiment.seeds[0], budget=budgets[0])


def trials_of(experiment: Experiment, cell: Cell) -> int:
    """How many trials a cell's method gets: none if it has nothing to search."""
    return experiment.search.trials if search_space(experiment, cell.method) else 0


def read_trials(experiment: Experiment, cell: Cell, lines: Sequence[Trial]) -> dict[int, Trial]:
    """Number -> trial, of those `lines` that are of a cell with the experiment's present settings and space."""
    present, before = trial_hash(experiment, cell), spaceless_hashes(experiment, cell)
    space, wanted = search_space(experiment, cell.method), range(trials_of(experiment, cell))
    return {
        line["trial"]: line
        for line in lines
        if line["trial"] in wanted
        and (line["hash"] == present or (line["hash"] in before and _lies_in(space, line["settings"])))
    }


def _lies_in(space: SearchSpace, found: Found) -> bool:
    """Whether a search of `space` may have drawn what was `found`, or it is the method's own settings."""
    drawn = found.keys() == space.keys() and all(allowed.holds(found[name]) for name, allowed in space.items())
    return drawn or not found


def run_trials(experiment: Experiment, cell: Cell, setup: Setup, progress: OnProgress) -> None:
    """Run the trials of a cell's method that are not on disk, each of which is a line as soon as it is done."""
    path = Path(experiment.output) / SEARCH_FILE
    done = read_trials(experiment, cell, read_lines(path))
    check_trials(done.values(), str(cell), setup.digests, path)
    space = search_space(experiment, cell.method)
    training = cell.method.lengthened(experiment.search.shorten(experiment.training))
    for number in range(trials_of(experiment, cell)):
        if number in done:
            continue
        found = propose(cell, space, [done[earlier] for earlier in range(number)])
        start, score = time.perf_counter(), None
        try:
            method = build_method(experiment, cell.method, found)
            taught = teach(setup, method, cell.budget, training, cell.seed, progress)
            score = taught.scores["score"]
        except NumericsError as error:  # such as a learning rate that is too large: what a search is to find out
            logger.warning("trial %d of %s has no score: %s", number, cell, error)
        done[number] = {
            "task": cell.names["task"], "method": cell.method.name, "trial": number, "score": score,
            "settings": found, "seconds": time.perf_counter() - start, "rows": setup.digests,
            "hash": trial_hash(experiment, cell),
        }  # fmt: skip
        append_line(path, done[number])
        if score is not None:
            logger.info("trial %d of %s: %.4f with %s", number, cell, score, found or "its own settings")


def search_space(experiment: Experiment, method: MethodConfig) -> SearchSpace:
    """What is searched: what a row's settings leave of its method's space, or what `search.settings` names of that.

    Of a row that is never taught it is nothing: all its trials would measure what the method begins from.
    """
    return {} if method.times_steps == 0 else method.search_space(experiment.search.settings)


def propose(cell: Cell, space: SearchSpace, past: Sequence[Trial]) -> Found:
    """Settings of the trial after `past`; of the first one none, so that the method's own are tried.

    What is drawn depends on the cell's seed and the trial's number: a search that was stopped goes on as if it had not
    been, and methods that search the same try the same at first, so that none has the luckier draws. The method's own
    settings are shown to the sampler if all of them lie in the space; they compete in any case.
    """
    if not past:
        return {}
    if len(past) < FIRST_TRIALS:
        return spread_settings(space, len(past) - 1, cell.seed)
    import optuna

    seed = int(np.random.SeedSequence([cell.seed, len(past)]).generate_state(1)[0])
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        name: optuna.distributions.CategoricalDistribution(allowed.values)
        if isinstance(allowed, Choice)
        else optuna.distributions.FloatDistribution(allowed.low, allowed.high, log=allowed.is_logarithmic)
        for name, allowed in space.items()
    }
    own = {name: getattr(cell.method.build(), name) for name in space}
    with _quiet_optuna():
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=0)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for line in (line for line in past if line["score"] is not None):
            tried = {**own, **line["settings"]}
            if all(allowed.holds(tried[name]) for name, allowed in space.items()):
                study.add_trial(
                    optuna.trial.create_trial(params=tried, distributions=distributions, value=line["score"])
                )
        found = study.ask(distributions).params
    return {name: _readable(space[name], found[name]) for name in space}


def spread_settings(space: SearchSpace, number: int, seed: int) -> Found:
    """The settings at one of the scrambled Sobol' points in the unit cube: of four, one lies in each quarter of a span.

    Args:
        space: what is searched, a dimension each.
        number: of the point, from 0.
        seed: of the scrambling.
    """
    points = qmc.Sobol(len(space), rng=np.random.default_rng(seed)).random_base2(number.bit_length())
    return {
        name: _readable(allowed, allowed.at(place))
        for (name, allowed), place in zip(space.items(), points[number], strict=True)
    }


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
