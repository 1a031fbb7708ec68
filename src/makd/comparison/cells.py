"""Station 10: the cells of a comparison, their order, and which of them are asked for."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from makd.baselines import Baseline
from makd.cache import CacheConfig
from makd.comparison.language import LanguageConfig
from makd.comparison.settings import Experiment, MethodConfig, Subject, budget_name, short_name
from makd.distill import TrainingConfig
from makd.errors import SettingError
from makd.provenance import anatomy_of, extensions_of
from makd.ranks.budget import Budget
from makd.registry import unknown_name
from makd.run_folder import plain
from makd.tasks import HELD_OUT, TaskConfig

KEYS = ("task", "method", "seed", "budget")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of the comparison."""

    task: Subject
    method: MethodConfig
    seed: int
    budget: Budget

    @property
    def names(self) -> dict[str, str | int]:
        """What `--only` and a line of the results call it."""
        return {
            "task": short_name(self.task),
            "method": self.method.name,
            "seed": self.seed,
            "budget": budget_name(self.budget),
        }

    def __str__(self) -> str:
        return cell_name(self.names)


def cell_name(names: Mapping[str, Any]) -> str:
    """A cell as it is told, from its `names`."""
    return "  ".join(str(names[key]) for key in KEYS)


def all_cells(experiment: Experiment) -> list[Cell]:
    """Every cell: a whole table of one seed at the first budget, then of the other seeds, then all the other budgets.

    Those of one task and seed stand together: they share a teacher and what it says.
    """
    first, others = experiment.budgets[:1], experiment.budgets[1:]
    return [
        Cell(task=task, method=method, seed=seed, budget=budget)
        for budgets in (first, others)
        for seed in experiment.seeds
        for task in experiment.subjects
        for budget in budgets
        for method in experiment.methods
        if method.is_compared_at(budget)
    ]


def select(cells: Iterable[Cell], only: str | None) -> list[Cell]:
    """Those cells that `only` names, such as `task=mrpc,method=makd,seed=1`; a key that is there twice allows both.

    Raises:
        UnknownNameError: a key or value that no cell has.
        SettingError: a part is not key=value.
    """
    chosen = list(cells)
    wanted: dict[str, set[str]] = {}
    for part in [] if only is None else only.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals:
            raise SettingError(
                f"--only is key=value, more of them after commas, with keys {', '.join(KEYS)}; got {part!r}."
            )
        if key not in KEYS:
            raise unknown_name("key of --only", key, KEYS)
        known = dict.fromkeys(str(cell.names[key]) for cell in chosen)
        if value not in known:
            raise unknown_name(f"{key} of this experiment", value, known)
        wanted.setdefault(key, set()).add(value)
    return [cell for cell in chosen if all(str(cell.names[key]) in values for key, values in wanted.items())]


def teacher_hash(experiment: Experiment, task: Subject, seed: int) -> str:
    """Says whether a task's teacher is of these settings: of the base model, the task and the fine-tuning.

    Of language, where the teacher is taken as it is: of that, the text and what is measured.
    """
    base = {
        "teacher": experiment.teacher,
        "tokenizer": experiment.tokenizer,
        **extensions_of(anatomy_of(experiment.teacher)),
    }
    if isinstance(task, LanguageConfig):
        return hash_settings({**base, "task": task, "seed": seed})
    recipe = plain(replace(experiment.finetune, seed=seed, device="cpu"))
    recipe["training"] = _said(experiment.finetune.training.of_weights())
    if recipe["save_dtype"] == "auto":
        del recipe["save_dtype"]  # lines from before there was a choice stay
    said: dict[str, Any] = plain(replace(task, extra_text=None))  # it learns from labels
    for name, default in (("tuning", None), ("longest_answer", TaskConfig.longest_answer)):
        if said[name] == default:
            del said[name]  # lines from before there was a choice stay
    return hash_settings({**base, "task": said, "recipe": recipe})


def cell_hash(experiment: Experiment, cell: Cell, found: Mapping[str, Any]) -> str:
    """Says whether a line of the results is of these settings: of all that its score may depend on but the machine.

    Args:
        experiment: what all cells share.
        cell: one of its cells.
        found: hyper-parameters of a search. A line says what they are, not how they were found.
    """
    return _hash_cell(_of_weights(experiment), cell, found)


def cell_hashes(experiment: Experiment, cell: Cell, found: Mapping[str, Any]) -> set[str]:
    """That hash, and what lines have of these settings from when those counted too that change no weight."""
    return {cell_hash(experiment, cell, found), _hash_cell(experiment, cell, found)}


def _of_weights(experiment: Experiment) -> Experiment:
    """With its defaults for what changes no score: how often is logged, how large a cache's files are."""
    cache = experiment.cache
    return replace(
        experiment,
        training=experiment.training.of_weights(),
        cache=None if cache is None else replace(cache, shard_megabytes=CacheConfig.shard_megabytes),
    )


def _hash_cell(experiment: Experiment, cell: Cell, found: Mapping[str, Any]) -> str:
    extra = cell.task.extra_text if isinstance(cell.task, TaskConfig) else None
    return hash_settings(
        {
            "teacher": teacher_hash(experiment, cell.task, cell.seed),
            "method": [cell.method.kind, _built(experiment, cell.method, found)],
            "budget": cell.budget,
            "training": _said(cell.method.lengthened(experiment.training)),
            "calibration": experiment.calibration,
            # numbers are rounded in a cache; lines from before there was a choice stay
            **({} if experiment.cache is None else {"cache": experiment.cache}),
            **({} if extra is None else {"extra_text": extra}),
            **extensions_of(plain(_built(experiment, cell.method, found))),
        }
    )


def trial_hash(experiment: Experiment, cell: Cell) -> str:
    """Hash of the settings that a trial depends on: the cell's, the space and how a trial is taught, not how many."""
    space = cell.method.search_space(experiment.search.settings)
    return _hash_trial(_of_weights(experiment), cell, {"space": space})


def spaceless_hashes(experiment: Experiment, cell: Cell) -> set[str]:
    """What lines have from when the method's own space did not count; and, before, what changes no weight did."""
    return {_hash_trial(_of_weights(experiment), cell, {}), _hash_trial(experiment, cell, {})}


def _hash_trial(experiment: Experiment, cell: Cell, space: Mapping[str, Any]) -> str:
    search = replace(experiment.search, trials=0, task=None)
    cell = replace(cell, task=_as_first_noted(cell.task))
    taught = replace(experiment, training=search.shorten(experiment.training))
    fixed = sorted(cell.method.settings)
    return hash_settings({"cell": _hash_cell(taught, cell, {}), "search": search, "fixed": fixed, **space})


def _as_first_noted(task: Subject) -> Subject:
    """The task of a trial as lines from before `tuning` have it, where those were sound and stay.

    They held the trials' rows out of the training rows as rows to measure on are, which were the same ones in part
    unless a task's official split is measured on.
    """
    if isinstance(task, LanguageConfig) or task.tuning is None or task.known.evaluation_splits is None:
        return task
    if task.evaluation_splits is not None and set(task.evaluation_splits) - set(task.known.evaluation_splits):
        return task
    return replace(task, evaluation_splits=(HELD_OUT,), held_out=task.tuning, tuning=None)


def latency_hash(experiment: Experiment, cell: Cell) -> str:
    """Says whether a latency is of a student of this shape, which nothing changes that a search could find."""
    built, searched = _built(experiment, cell.method, {}), cell.method.build().search
    return hash_settings(
        {
            "teacher": experiment.teacher,
            "method": [cell.method.kind, {name: value for name, value in built.items() if name not in searched}],
            "budget": cell.budget,
            "calibration": experiment.calibration,
            "tokens": experiment.latency_tokens,
            **extensions_of(built, anatomy_of(experiment.teacher)),
            # of tasks it is float32; lines from before dtypes counted stay
            **_dtype(cell.task),
        }
    )


def _dtype(task: Subject) -> dict[str, str]:
    dtype = task.dtype if isinstance(task, LanguageConfig) else "float32"
    return {} if dtype == "float32" else {"dtype": dtype}


def build_method(experiment: Experiment, method: MethodConfig, found: Mapping[str, Any]) -> Baseline:
    """A method with its settings and with those that a search found; what it leaves to the comparison is filled in."""
    built: Any = method.build(**found)
    if getattr(built, "trainable", "") is None:
        built = replace(built, trainable=experiment.training.trainable)
    made: Baseline = built
    return made


def _built(experiment: Experiment, method: MethodConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """A method's hyper-parameters. What is None says nothing: a method may get another choice, and lines stay."""
    own = asdict(build_method(experiment, method, found))  # type: ignore[call-overload]
    return {name: value for name, value in own.items() if name != "search" and value is not None}


def _said(training: TrainingConfig) -> dict[str, Any]:
    """The settings of a training. What is of adapters says nothing where there are none: older lines stay.

    A comparison runs in one process, where no teacher is sharded.
    """
    settings: dict[str, Any] = plain(training)
    del settings["shard_teacher"]
    if training.trainable != "adapters":
        del settings["adapter_rank"]
    return settings


def hash_settings(settings: object) -> str:
    """Says whether what was found is of these settings: a few digits of them, as JSON has them."""
    return hashlib.sha256(json.dumps(plain(settings), sort_keys=True).encode()).hexdigest()[:16]
