"""Station 10: what cells would be refused for, told before the first teacher is made.

A teacher that has not been taught yet is what its task's will be in all that a refusal hangs on but its weights: so
each cell is gone through on the base model, with the functions that the cell itself goes through, up to where work
would begin. In the place of low-rank students stands the teacher; those of fewer or narrower layers are made.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from makd.baselines import Choice
from makd.baselines.starts import unmade_start
from makd.comparison.caches import kept_for
from makd.comparison.cells import Cell, build_method, hash_settings
from makd.comparison.language import LanguageConfig
from makd.comparison.language_rows import read_texts
from makd.comparison.rows import Rows
from makd.comparison.search import Found, known_settings, search_space, searched_at
from makd.comparison.settings import Experiment, MethodConfig, Subject
from makd.comparison.setup import calibration_of, place_data, place_language
from makd.comparison.teach import count_steps, trainings_of
from makd.config import find_device
from makd.data import choose_tokenizer
from makd.distill import TrainingConfig, check_stage
from makd.errors import MakdError
from makd.finetuning import check_learner
from makd.loading import check_dtype, load_model
from makd.tasks import load_task_model, read_task, tokenize_task


@dataclass(frozen=True)
class _Taught:
    """What one student would go through: a cell's, or a trial's."""

    cell: Cell
    found: Found
    training: TrainingConfig

    @property
    def task(self) -> str:
        """Says which rows, and with them which teacher."""
        return hash_settings(self.cell.task)

    @property
    def student(self) -> str:
        """Says which student of a teacher it is."""
        return hash_settings([self.cell.method, self.cell.budget, self.found])

    @property
    def whole(self) -> str:
        """Says all but the seed."""
        return hash_settings([self.student, self.task, self.training])


def check_cells(experiment: Experiment, cells: Sequence[Cell]) -> None:
    """Refuse an experiment some of whose `cells` would be refused at their turn; nothing is taught or written.

    Raises:
        MakdError: what the cell, a search's trial or a fine-tuning would say; with the cell's name, if it is of it.
    """
    try:
        _check_all(experiment, cells)
    finally:
        torch.cuda.empty_cache()  # workers have models of their own


def _check_all(experiment: Experiment, cells: Sequence[Cell]) -> None:
    """Refuse what `check_cells` refuses; the models that it takes are gone when it returns."""
    first: dict[str, _Taught] = {}
    for one in _students(experiment, cells):
        first.setdefault(one.whole, one)
    taught = list(first.values())
    alike: dict[str, tuple[PreTrainedModel, dict[str, Rows]]] = {}
    for name, task in {one.task: one.cell.task for one in taught}.items():
        teacher, rows = _untaught(experiment, task)
        # one is kept of teachers that are alike in all but what they are taught
        alike.setdefault(_kind(teacher), (teacher, {}))[1][name] = rows
    for teacher, all_rows in alike.values():
        groups: dict[str, list[_Taught]] = {}
        for one in taught:
            if one.task in all_rows:
                groups.setdefault(one.student, []).append(one)
        for group in groups.values():
            _check_students(experiment, teacher, all_rows, group)


def _students(experiment: Experiment, cells: Sequence[Cell]) -> Iterator[_Taught]:
    """What would be taught; of searches that are not over, a student of each name that they may choose."""
    known = known_settings(experiment, cells)
    for cell in cells:
        found, training = known[str(cell)], cell.method.lengthened(experiment.training)
        if found is not None:
            yield _Taught(cell, found, training)
            continue
        searched = searched_at(experiment, cell)
        shortened = cell.method.lengthened(experiment.search.shorten(experiment.training))
        for choice in _choices(experiment, cell.method):
            yield _Taught(searched, choice, shortened)
            yield _Taught(cell, choice, training)


def _choices(experiment: Experiment, method: MethodConfig) -> list[Found]:
    """The method's own settings, and those that differ by one name; that numbers go together is known already."""
    space, own = search_space(experiment, method), method.build()
    named = {name: allowed.values for name, allowed in space.items() if isinstance(allowed, Choice)}
    others = [{name: value} for name, values in named.items() for value in values if value != getattr(own, name)]
    return [{}, *others]


def _untaught(experiment: Experiment, task: Subject) -> tuple[PreTrainedModel, Rows]:
    """What the teacher of a task is fine-tuned from, with its head; of language, the teacher. And the rows."""
    words, seed = choose_tokenizer(experiment.tokenizer, experiment.teacher), experiment.seeds[0]
    device = find_device(experiment.device)
    if isinstance(task, LanguageConfig):
        placed = place_language(task, experiment.data)
        teacher = load_model(experiment.teacher, dtype=check_dtype(task.dtype), device=device)
        return teacher, read_texts(placed, teacher, words, seed)
    rows = read_task(place_data(task, experiment.data))
    teacher = load_task_model(experiment.teacher, rows, words, seed, device=device)
    check_learner(teacher, experiment.finetune)
    return teacher, tokenize_task(rows, words, teacher, seed)


def _kind(teacher: PreTrainedModel) -> str:
    """Says whether plans and students fit two untaught teachers alike."""
    config = teacher.config
    head = {"labels": config.num_labels, "problem": getattr(config, "problem_type", None), "dtype": str(teacher.dtype)}
    return hash_settings({"class": type(teacher).__name__, **head})


def _check_students(
    experiment: Experiment, teacher: PreTrainedModel, all_rows: Mapping[str, Rows], group: Sequence[_Taught]
) -> None:
    """Refuse what one student of `teacher` could not go through, on the rows and with the steps of each of `group`."""
    one = group[0]
    try:
        method: Any = build_method(experiment, one.cell.method, one.found)
        few = replace(experiment.calibration, rows=experiment.calibration.batch_size)
        calibration = calibration_of(all_rows[one.task], teacher, few)
        made = method.prepare(teacher, one.cell.budget, calibration, one.cell.seed, unmade_start)
        for one in group:
            rows = all_rows[one.task]
            for plan, training in trainings_of(made, method, one.training, count_steps(rows, one.training)):
                kept = kept_for(plan, made.student, teacher)[1] if experiment.cache is not None else ()
                check_stage(plan, training, made.student, teacher, rows.distillation, cached=bool(kept))
    except MakdError as error:
        raise type(error)(f"{one.cell}: {error}") from error
