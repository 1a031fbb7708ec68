"""Station 10: what is compared: one frozen dataclass, the same object in Python and in `experiment.yaml`."""

import dataclasses
import itertools
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from makd.aspects import PRESETS
from makd.baselines import BASELINES, Baseline, Choice, SearchSpace, Span
from makd.cache import CacheConfig
from makd.comparison.language import LanguageConfig
from makd.config import CalibrationConfig, FinetuneRecipe, check_seed, find_device
from makd.distill import TrainingConfig
from makd.errors import MakdError, SettingError
from makd.kinds import checked, fit
from makd.ranks.budget import Budget
from makd.registry import unknown_name
from makd.tasks import TaskConfig

Subject = TaskConfig | LanguageConfig
"""What teacher and students are compared on."""

OURS = ("makd", "makd_paper")
"""Names in `BASELINES` that are no baselines: what is compared with them."""

_IDLE = {
    "learning_rate": "it is each method's own (methods[].settings.learning_rate)",
    "evaluate_every": "no cell is evaluated before its end",
    "save_every": "a cell that was stopped begins anew",
    "shard_teacher": "a comparison runs in one process",
}
"""Settings of a training that no cell does anything with, and why."""


@dataclass(frozen=True, kw_only=True)
@checked("methods[]")
class MethodConfig:
    """A row of the comparison: a method, with whatever differs from its own hyper-parameters."""

    name: str
    """Name of the row; and of the method in `makd.baselines.BASELINES`, unless `method` is given."""
    method: str | None = None
    """One of `BASELINES`, where one method has several rows. None: `name`."""
    settings: dict[str, int | float | str | bool | None] = field(default_factory=dict)
    """Hyper-parameters, `learning_rate` among them; what is not here is the method's own."""
    budgets: tuple[Budget, ...] | None = None
    """Those of the experiment's budgets that it is compared at; None: all of them."""
    times_steps: float = 1.0
    """How many times the experiment's steps it learns: 1 compares at equal steps; what one method's step takes, divided
    by what this one's takes, at equal time; 0 measures what it begins from."""

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set(",="):
            raise SettingError(f"methods[].name is a word without , and =; got {self.name!r}.")
        if self.times_steps < 0:
            raise SettingError(f"methods[].times_steps is at least 0; {self.name} has {self.times_steps}.")
        if self.budgets == ():
            raise SettingError(f"methods[].budgets is at least one, or null for all; {self.name} has an empty list.")
        object.__setattr__(self, "settings", self._checked())
        rate = self.build().learning_rate
        if rate <= 0:
            raise SettingError(f"methods[].settings.learning_rate of {self.name} is above 0; got {rate}.")
        for value in self.settings.values():
            if isinstance(value, str) and value in PRESETS and PRESETS[value].completions.adaptive:
                raise SettingError(
                    f"The preset {value} of {self.name} follows the loss on held-out rows, and a comparison has none "
                    "but those that it is measured on. Take gkd or minillm; `makd compress` learns by it."
                )

    def _checked(self) -> dict[str, int | float | str | bool | None]:
        """The settings; `3` of what is a number is `3.0`, so that both are one cell."""
        kinds = {name: kind for name, kind in typing.get_type_hints(type(self._own)).items() if name != "search"}
        for name in self.settings:
            if name not in kinds:
                raise unknown_name(f"setting of the method {self.kind}", name, kinds)
        return {
            name: fit(value, kinds[name], f"methods[].settings.{name} of {self.name}")
            for name, value in self.settings.items()
        }

    @property
    def kind(self) -> str:
        """The method's name in `BASELINES`."""
        return self.method or self.name

    @property
    def _own(self) -> Baseline:
        return BASELINES[self.kind]

    def is_compared_at(self, budget: Budget) -> bool:
        """Whether it has cells at one of the experiment's budgets."""
        return self.budgets is None or budget in self.budgets

    def lengthened(self, training: TrainingConfig) -> TrainingConfig:
        """`training` with this method's number of steps."""
        if self.times_steps == 0:
            return dataclasses.replace(training, steps=0)
        steps = None if training.steps is None else max(1, round(training.steps * self.times_steps))
        return dataclasses.replace(training, steps=steps, epochs=training.epochs * self.times_steps)

    def build(self, **found: float | int | str | bool | None) -> Baseline:
        """The method with its settings; `found` are those of a search, which count where `settings` has none."""
        made: Any = self._own
        built: Baseline = dataclasses.replace(made, **{**found, **self.settings})
        return built

    def search_space(self, named: Collection[str] | None = None) -> SearchSpace:
        """What a search tries: the method's space, or what is `named` of it, as far as this row's settings leave it.

        What they fix is not searched, nor is what does not go with them: the weight of a term that its preset has not.
        """
        built = self.build()
        space: dict[str, Span | Choice] = {}
        for name, allowed in built.search.items():
            if name in self.settings or (named is not None and name not in named):
                continue
            possible = tuple(value for value in allowed.ends if self._refusal({name: value}) is None)
            if possible == allowed.ends:
                space[name] = allowed
            elif isinstance(allowed, Choice) and {*possible} - {getattr(built, name)}:
                space[name] = Choice(possible)
        return space

    def check_search(self, named: Collection[str] | None = None) -> None:
        """Refuse a search that would try hyper-parameters which do not go together, before anything is taught.

        Raises:
            SettingError: at a corner of the search space the method refuses them.
        """
        space = self.search_space(named)
        for corner in itertools.product(*(allowed.ends for allowed in space.values())):
            tried = dict(zip(space, corner, strict=True))
            refusal = self._refusal(tried)
            if refusal is not None:
                told = ", ".join(f"{name} {value}" for name, value in tried.items())
                raise SettingError(
                    f"A search of {self.name} would try {told}, which the method refuses: {refusal} Fix one of them in "
                    "methods[].settings, or name in search.settings what is searched."
                )

    def _refusal(self, found: dict[str, Any]) -> MakdError | None:
        """Why the method cannot have the hyper-parameters `found` beside its settings; None if it can."""
        try:
            self.build(**found)
        except MakdError as error:
            return error
        return None


@dataclass(frozen=True, kw_only=True)
@checked("search")
class SearchConfig:
    """A search of every method's hyper-parameters by optuna, the same for all, on training rows alone."""

    trials: int = 0
    """Settings that are tried for each method; the first are the method's own. 0 searches nothing."""
    task: str | None = None
    """Task of the experiment, as cells call it, that every method is searched on, for all tasks; None searches on each
    task for itself."""
    settings: tuple[str, ...] | None = None
    """Names of the hyper-parameters that are searched, such as `learning_rate`; None: all that a method has a space
    for. Few trials find little in many dimensions."""
    held_out: float = 0.2
    """Share of the training rows that a trial is scored on and not taught, in (0, 1)."""
    steps: int | None = None
    """Optimizer steps of a trial; None takes as many as a cell has."""

    def __post_init__(self) -> None:
        if self.trials < 0:
            raise SettingError(f"search.trials is at least 0; got {self.trials}.")
        if not 0 < self.held_out < 1:
            raise SettingError(f"search.held_out is a share of the training rows, in (0, 1); got {self.held_out}.")
        if self.steps is not None and self.steps < 1:
            raise SettingError(f"search.steps is at least 1, or null; got {self.steps}.")

    def shorten(self, training: TrainingConfig) -> TrainingConfig:
        """`training` with a trial's number of steps; how many epochs a cell has is nothing to it then."""
        return training if self.steps is None else dataclasses.replace(training, steps=self.steps, epochs=1.0)


@dataclass(frozen=True, kw_only=True)
@checked("experiment")
class Experiment:
    """Which methods are compared, on which tasks, at which budgets, with which seeds; and what all of them share."""

    teacher: str
    """A hub id, a folder, or `package:module/path`: the base model that is fine-tuned once for each task and seed; for
    `language` the teacher itself."""
    methods: tuple[MethodConfig, ...]
    budgets: tuple[Budget, ...]
    """The decisive one first."""
    output: str
    """Folder for results, teachers and searches. An experiment that was stopped goes on there."""
    tasks: tuple[TaskConfig, ...] = ()
    """Cheapest first: cells are run in the order of the lists."""
    language: tuple[LanguageConfig, ...] = ()
    """Text and instructions for a causal language model, beside tasks or without; after them."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Of the teacher, the order of the rows and whatever a method draws."""
    data: str | None = None
    """Folder that the tasks' relative paths are looked for in. None: the environment's `MAKD_DATA`, if it is set."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the teacher."""
    finetune: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    """How the task teachers are made; its `seed` and `device` are those of the experiment."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How every student learns: steps or epochs, batches, schedule. The learning rate is each method's own."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    cache: CacheConfig | None = None
    """Ask the teacher about each training row once for the cells of a task and seed, and keep what it says on disk
    until they are done; None asks it at every step."""
    search: SearchConfig = field(default_factory=SearchConfig)
    latency: bool = True
    """Whether forwards of teacher and student are timed, at batch 1 and 16."""
    latency_tokens: int = 128
    """Tokens of a row in the timed forwards."""
    device: str = "auto"
    """`auto` takes an accelerator if there is one; or `cpu`, `cuda`, …"""

    def __post_init__(self) -> None:
        self._check_lists()
        self._check_search()
        for seed in self.seeds:
            check_seed("each of an experiment's seeds", seed)
        if self.training.steps == 0:
            raise SettingError("training.steps of an experiment is at least 1, or null to train for `epochs`; got 0.")
        idle = next((name for name in _IDLE if getattr(self.training, name) != getattr(TrainingConfig, name)), None)
        if idle is not None:
            raise SettingError(
                f"training.{idle} of an experiment does nothing: {_IDLE[idle]}. Leave it out; got "
                f"{getattr(self.training, idle)!r}."
            )
        for dtype in ("float32", *(one.dtype for one in self.language)):
            self.training.check_teacher_dtype(dtype, cached=self.cache is not None)
        if self.latency_tokens < 1:
            raise SettingError(f"latency_tokens is at least 1; got {self.latency_tokens}.")
        if self.device != "auto":
            find_device(self.device)
        try:
            Path(self.output).exists()
        except OSError as error:  # a name too long, a folder that may not be looked into
            raise SettingError(
                f"output of an experiment is a folder; {error.strerror}: {self.output[:80]!r}."
            ) from error

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """What the methods are compared on, in order."""
        return (*self.tasks, *self.language)

    def _check_search(self) -> None:
        tasks = [short_name(subject) for subject in self.subjects]
        if self.search.task is not None and self.search.task not in tasks:
            raise unknown_name("task of the search", self.search.task, tasks)
        tuned = next((short_name(task) for task in self.tasks if task.tuning is not None), None)
        if self.search.trials and tuned is not None:
            raise SettingError(
                f"A search holds back rows of its own (search.held_out), and {tuned} has `tuning`, for a choice by "
                "hand. Leave out one of them."
            )
        measured = next((one.name for one in self.language if one.held_out is not None), None)
        if self.search.trials and measured is not None:
            raise SettingError(
                f"A search holds back training rows (search.held_out), and {measured} is measured on some of them "
                "(language[].held_out): settings would be chosen on the rows that they are scored on. Leave out one of "
                "them."
            )
        known = list(dict.fromkeys(name for method in self.methods for name in method.build().search))
        for name in self.search.settings or ():
            if name not in known:
                raise unknown_name("hyper-parameter of the search", name, known)
        if self.search.trials:
            for method in self.methods:
                method.check_search(self.search.settings)

    def _check_lists(self) -> None:
        if not self.subjects:
            raise SettingError("An experiment is on a list of at least one of `tasks` or `language`; both are empty.")
        for name in ("methods", "budgets", "seeds"):
            if not getattr(self, name):
                raise SettingError(f"{name} of an experiment is a list of at least one; got an empty one.")
        names: dict[str, list[object]] = {
            "tasks and language": [short_name(subject) for subject in self.subjects],
            "methods": [method.name for method in self.methods],
            "budgets": [budget_name(budget) for budget in self.budgets],
            "seeds": list(self.seeds),
        }
        for name, values in names.items():
            twice = sorted({str(value) for value in values if values.count(value) > 1})
            if twice:
                raise SettingError(
                    f"{name} of an experiment differ from each other; {', '.join(twice)} is there twice."
                )
        for method in self.methods:
            for budget in method.budgets or ():
                if budget not in self.budgets:
                    raise unknown_name(f"budget of {method.name}", budget_name(budget), names["budgets"])


def short_name(task: Subject) -> str:
    """What a cell calls a task: the last part of its name, or of its path where the name says but what kind it is."""
    if isinstance(task, LanguageConfig):
        return task.name
    if task.known.path is None and task.path is not None:
        return Path(task.path).stem.translate({ord(letter): "-" for letter in ",="})  # --only splits there
    return task.name.rpartition("/")[2]


def budget_name(budget: Budget) -> str:
    """What a cell calls a budget, such as `keep_linears=0.5`."""
    values = {item.name: getattr(budget, item.name) for item in dataclasses.fields(budget)}
    return ",".join(f"{name}={value}" for name, value in values.items() if value is not None)
