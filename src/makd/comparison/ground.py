"""Station 10: what the cells of one task and seed share: a fine-tuned teacher, rows, calibration batches."""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from makd.comparison.caches import TeacherCaches
from makd.comparison.cells import teacher_hash
from makd.comparison.settings import Experiment, short_name
from makd.config import find_device
from makd.data import Batch, make_batches
from makd.errors import DataError
from makd.finetuning import finetune
from makd.loading import load_model, load_tokenizer
from makd.run import Progress
from makd.tasks import METRICS, Task, TaskConfig, load_task
from makd.tasks.features import without_targets
from makd.tasks.metrics import score

logger = logging.getLogger(__name__)

DATA_VARIABLE = "MAKD_DATA"
"""Environment variable that names the folder of relative paths."""


@dataclass(frozen=True)
class Ground:
    """Where the methods meet."""

    teacher: PreTrainedModel
    task: Task
    calibration: list[Batch]
    teacher_scores: dict[str, float]
    """The teacher's metrics on the rows that students are measured on."""
    majority: float | None
    """Score of the most frequent class of the training rows; None where a task has no classes for whole rows."""
    caches: TeacherCaches | None = None
    """What the teacher says about the training rows, where the experiment keeps it."""


def prepare_ground(experiment: Experiment, task: TaskConfig, seed: int, progress: Progress) -> Ground:
    """The teacher of a task and seed, made if it is not there yet, and the rows as it reads them.

    Raises:
        MakdError: the data or the base model cannot be loaded.
    """
    placed, folder = place_data(task, experiment.data), make_teacher(experiment, task, seed, progress)
    tokenizer = load_tokenizer(str(folder))
    model = load_model(str(folder), task.kind.head, device=find_device(experiment.device))
    rows = load_task(placed, tokenizer, model, seed)
    few = experiment.calibration
    return Ground(
        teacher=model,
        task=rows,
        calibration=make_batches(
            without_targets(rows.train), tokenizer, model, few.batch_size, few.rows, by_length=True
        ),
        teacher_scores=rows.evaluate(model),
        majority=majority_score(rows),
        caches=None if experiment.cache is None else TeacherCaches(model, rows, experiment.cache, progress),
    )


def make_teacher(experiment: Experiment, task: TaskConfig, seed: int, progress: Progress) -> Path:
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
            placed = place_data(task, experiment.data)
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


def teacher_folder(experiment: Experiment, task: TaskConfig, seed: int) -> Path:
    """Where the teacher of a task and seed is kept; one of other settings has another folder."""
    name = f"{short_name(task)}_seed{seed}_{teacher_hash(experiment, task, seed)}"
    return Path(experiment.output) / "teachers" / name


class Grounds:
    """The ground of the last task and seed: the cells of one follow each other, and two teachers would take room."""

    def __init__(self, experiment: Experiment, progress: Progress) -> None:
        self.experiment, self.progress = experiment, progress
        self.last: Path | None = None
        """Folder of the last one's teacher."""
        self._ground: Ground | None = None

    def of(self, task: TaskConfig, seed: int) -> Ground:
        """The ground of a task and seed."""
        folder = teacher_folder(self.experiment, task, seed)
        if self._ground is None or self.last != folder:
            self.close()
            self._ground = prepare_ground(self.experiment, task, seed, self.progress)
            self.last = folder
        return self._ground

    def close(self) -> None:
        """Remove what the last one keeps on disk for its cells alone."""
        if self._ground is not None and self._ground.caches is not None:
            self._ground.caches.close()
        self.last = self._ground = None


def place_data(task: TaskConfig, data: str | None) -> TaskConfig:
    """The task with its relative path looked for in `data`, or in the folder that `MAKD_DATA` names.

    What is not there is left as it is: it may be a hub id, or be relative to the working directory.

    Raises:
        DataError: `data` is no folder.
    """
    root = data or os.environ.get(DATA_VARIABLE)
    if data is not None and not Path(data).expanduser().is_dir():
        raise DataError(
            f"{data} is no folder. Give --data (or {DATA_VARIABLE}) the folder that the tasks' paths are in."
        )
    if root is None or task.path is None:
        return task
    there = Path(root).expanduser() / task.path
    return replace(task, path=str(there)) if there.exists() else task


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
