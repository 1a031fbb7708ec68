"""Station 10: what the cells of one task and seed share: a fine-tuned teacher, rows, calibration batches."""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from transformers import PreTrainedModel, set_seed

from makd.calibration.counted import CountedBatches
from makd.comparison.caches import TeacherCaches
from makd.comparison.cells import teacher_hash
from makd.comparison.language import LanguageConfig
from makd.comparison.language_rows import load_rows
from makd.comparison.rows import Rows
from makd.comparison.same_rows import rows_digests
from makd.comparison.settings import Experiment, Subject, short_name
from makd.config import CalibrationConfig, find_device
from makd.data import DataConfig, calibration_batches, choose_tokenizer
from makd.errors import DataError
from makd.finetuning import finetune
from makd.loading import check_dtype, load_model, load_tokenizer
from makd.preparation import names_of
from makd.progress import OnProgress
from makd.tasks import METRICS, Task, TaskConfig, load_task
from makd.tasks.features import without_targets
from makd.tasks.metrics import score

logger = logging.getLogger(__name__)

DATA_VARIABLE = "MAKD_DATA"
"""Environment variable that names the folder of relative paths."""


@dataclass(frozen=True)
class Setup:
    """What every method gets alike."""

    teacher: PreTrainedModel
    task: Rows
    digests: dict[str, str]
    """Of the rows and the teacher, as a line notes them."""
    calibration: CountedBatches
    measure: Callable[[PreTrainedModel], dict[str, float]]
    """Metrics of a model on the rows that students are measured on, and their `score`."""
    teacher_scores: dict[str, float]
    """The teacher's metrics on the rows that students are measured on."""
    majority: float | None
    """Score of the most frequent class of the training rows; None where a task has no classes for whole rows."""
    caches: TeacherCaches | None = None
    """The teacher's outputs on the training rows, where the experiment keeps them."""


def prepare_setup(experiment: Experiment, task: Subject, seed: int, progress: OnProgress) -> Setup:
    """The teacher of a task and seed, made if it is not there yet, and the rows as it reads them.

    Raises:
        MakdError: the data or the base model cannot be loaded.
    """
    if isinstance(task, LanguageConfig):
        return _language_setup(experiment, task, seed, progress)
    placed, folder = place_data(task, experiment.data), make_teacher(experiment, task, seed, progress)
    tokenizer = load_tokenizer(str(folder))
    model = load_model(str(folder), task.kind.head, device=find_device(experiment.device))
    rows = load_task(placed, tokenizer, model, seed)
    measure = partial(rows.evaluate, batch_size=experiment.finetune.evaluation_batch_size, on_progress=progress)
    return Setup(
        teacher=model,
        task=rows,
        digests=rows_digests(rows, model),
        calibration=calibration_of(rows, model, experiment.calibration),
        measure=measure,
        teacher_scores=measure(model),
        majority=majority_score(rows),
        caches=None if experiment.cache is None else TeacherCaches(model, rows, experiment.cache, progress),
    )


def _language_setup(experiment: Experiment, language: LanguageConfig, seed: int, progress: OnProgress) -> Setup:
    """What cells of one seed share where they are measured on text: the teacher as it is, and its rows."""
    set_seed(seed)
    words = choose_tokenizer(experiment.tokenizer, experiment.teacher)
    model = load_model(experiment.teacher, dtype=check_dtype(language.dtype), device=find_device(experiment.device))
    rows = load_rows(place_language(language, experiment.data), model, words, seed, progress)
    return Setup(
        teacher=model,
        task=rows,
        digests=rows_digests(rows, model),
        calibration=calibration_of(rows, model, experiment.calibration),
        measure=rows.evaluate,
        teacher_scores=rows.teacher_scores,
        majority=None,
        caches=None if experiment.cache is None else TeacherCaches(model, rows, experiment.cache, progress),
    )


def calibration_of(rows: Rows, model: PreTrainedModel, few: CalibrationConfig) -> CountedBatches:
    """What factorizations look at: some of the training rows, without labels."""
    text = without_targets(rows.train) if isinstance(rows, Task) else rows.distillation
    return calibration_batches(text, rows.tokenizer, model, few.batch_size, few.rows)


def is_made(task: Subject, folder: Path) -> bool:
    """Whether the teacher of `folder` needs no making: it is there, or is taken as it is."""
    return isinstance(task, LanguageConfig) or folder.is_dir()


def make_teacher(experiment: Experiment, task: TaskConfig, seed: int, progress: OnProgress) -> Path:
    """The folder of a task's teacher, which is fine-tuned if it is not there yet.

    Raises:
        MakdError: the data or the base model cannot be loaded.
    """
    folder = teacher_folder(experiment, task, seed)
    if folder.is_dir():
        return folder
    with _alone(folder, Path(experiment.output)):
        if not folder.is_dir():  # else another process has made it in the meantime
            logger.info("teacher of %s, seed %d: fine-tuned once, kept in %s", short_name(task), seed, folder)
            recipe = replace(experiment.finetune, seed=seed, device=experiment.device)
            placed = replace(place_data(task, experiment.data), extra_text=None)  # a teacher learns from labels
            finetune(
                experiment.teacher, placed, recipe, folder, tokenizer=experiment.tokenizer, overwrite=True,
                on_progress=progress,
            )  # fmt: skip
    return folder


@contextmanager
def _alone(folder: Path, output: Path) -> Iterator[None]:
    """One process at a time makes `folder`; others wait for it, by a lock in `output`."""
    output.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("%s is being made by another process: waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def teacher_folder(experiment: Experiment, task: Subject, seed: int) -> Path:
    """Where the teacher of a task and seed is kept; one of other settings has another folder.

    It names the setup where the teacher is taken as it is, and is never made.
    """
    name = f"{short_name(task)}_seed{seed}_{teacher_hash(experiment, task, seed)}"
    return Path(experiment.output) / "teachers" / name


class Setups:
    """The setup of the last task and seed: the cells of one follow each other, and two teachers would take room."""

    def __init__(self, experiment: Experiment, progress: OnProgress) -> None:
        self.experiment, self.progress = experiment, progress
        self.last: Path | None = None
        """Folder of the last one's teacher."""
        self._setup: Setup | None = None

    def of(self, task: Subject, seed: int) -> Setup:
        """The setup of a task and seed."""
        folder = teacher_folder(self.experiment, task, seed)
        if self._setup is None or self.last != folder:
            self.close()
            self._setup = prepare_setup(self.experiment, task, seed, self.progress)
            self.last = folder
        return self._setup

    def close(self) -> None:
        """Remove what the last one keeps on disk for its cells alone."""
        if self._setup is not None and self._setup.caches is not None:
            self._setup.caches.close()
        self.last = self._setup = None


def paths_of(experiment: Experiment) -> dict[str, str]:
    """All paths that its tasks, texts and instructions are read from, and where each is looked for."""
    found: list[str | None] = []
    for task in experiment.tasks:
        found += names_of(task)
    for language in experiment.language:
        texts = [language.text, *([] if language.other is None else [language.other])]
        found += [path for text in texts for path in names_of(text)] + [one.path for one in language.instructions]
    return {path: _place(path, experiment.data) for path in found if path is not None}


def place_data(task: TaskConfig, data: str | None) -> TaskConfig:
    """The task with its relative path looked for in `data`, or in the folder that `MAKD_DATA` names.

    What is not there is left as it is: it may be a hub id, or be relative to the working directory.

    Raises:
        DataError: `data` is no folder.
    """
    return task if task.path is None else replace(task, path=_place(task.path, data))


def place_language(language: LanguageConfig, data: str | None) -> LanguageConfig:
    """The texts and instructions with relative paths looked for as `place_data` does.

    Raises:
        DataError: `data` is no folder.
    """
    other = language.other
    return replace(
        language,
        text=_place_text(language.text, data),
        other=None if other is None else _place_text(other, data),
        instructions=tuple(replace(one, path=_place(one.path, data)) for one in language.instructions),
    )


def _place_text(text: DataConfig, data: str | None) -> DataConfig:
    """A text with its path, or those of its mixture, looked for in `data`."""
    if text.mixture:
        return replace(text, mixture=tuple(replace(one, path=_place(one.path, data)) for one in text.mixture))
    return replace(text, path=_place(text.place, data))


def _place(path: str, data: str | None) -> str:
    root = data or os.environ.get(DATA_VARIABLE)
    if data is not None and not Path(data).expanduser().is_dir():
        raise DataError(
            f"{data} is no folder. Give --data (or {DATA_VARIABLE}) the folder that the tasks' paths are in."
        )
    there = None if root is None else Path(root).expanduser() / path
    return path if there is None or not there.exists() else str(there)


def majority_score(task: Task) -> float | None:
    """The score of a model that has learned nothing but which class is the most frequent."""
    kind = task.config.known.kind
    if kind == "regression":
        return 0.0  # a constant has no correlation with anything
    if kind != "classification":
        return None
    values, counts = np.unique(task.in_data_order(_labels(task.train["label"])), return_counts=True)
    found = []
    for rows in task.evaluation.values():
        true = task.in_data_order(_labels(rows["label"]))
        same = np.full_like(true, values[counts.argmax()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # metrics of a class that nobody predicts are 0, which is meant
            found.append(score(kind, {name: METRICS[kind][name](same, true) for name in task.config.measured}))
    return sum(found) / len(found)


def _labels(column: Iterable[int]) -> list[int]:
    return [int(label) for label in column]
