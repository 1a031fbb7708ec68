"""Station 2, for tasks: whether the rows left after all limits and splits can teach and measure what they name.

Data may stand sorted by class: its first rows are then of one class, and whoever always says that one is always right.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from datasets import Dataset

from makd.errors import DataError
from makd.tasks.labels import UNLABELLED

logger = logging.getLogger(__name__)

SHOWN = 5
"""Classes that are named in a warning."""
NUMBERED = "; if there is no such class, number the others from 0"
"""What is told besides of classes without names: labels that begin at 1 make a class 0, which the head then has."""


def check_classes(
    labels: Sequence[str], train: Dataset, evaluation: Mapping[str, Dataset], drawn: Collection[str], where: str
) -> None:
    """Refuse rows of one class alone, and warn of classes, or labels, without rows.

    Args:
        labels: names of the classes in the order in which rows number them.
        train: rows with labels as numbers, in `label` (of several labels a row, a 0 or 1 for each) or `tags`.
        evaluation: split -> its rows, likewise.
        drawn: splits that are rows of the training split, drawn by their texts: too few may be of one class, but not
            because the data is sorted.
        where: where the data is, for errors.

    Raises:
        DataError: all rows that are trained on, or all of a split that is not drawn, have the same label.
    """
    for split, rows in {"": train, **evaluation}.items():
        which = f"split {split!r} of {where}" if split else f"{where} that are trained on"
        setting = f"task.{split}" if split in drawn else "task.evaluation_rows" if split else "task.rows"
        found = _distinct(rows)
        if len(found) < 2 and split not in drawn:
            raise DataError(
                f"All {len(rows):,} rows of {which} have the same label, {_told(labels, *found)}: there is nothing to "
                "tell apart, and whoever always says it is always right. If the data is sorted by class, shuffle it; "
                f"else take more rows ({setting})."
            )
        there = _numbers(found)
        missing = [label for number, label in enumerate(labels) if number not in there]
        if missing:
            more = [f"{len(missing) - SHOWN} more"] if missing[SHOWN:] else []
            logger.warning(
                "None of the %s rows of %s has the label %s: it is not %s. Shuffle data that is sorted by class, or "
                "take more rows (%s)%s",
                f"{len(rows):,}", which, " or ".join(missing[:SHOWN] + more), "measured" if split else "learned",
                setting, NUMBERED if tuple(labels) == tuple(map(str, range(len(labels)))) else "",
            )  # fmt: skip


def _distinct(rows: Dataset) -> set[Any]:
    """Classes, sets of labels, or tags that occur."""
    if "tags" in rows.column_names:
        return {tag for tags in rows["tags"] for tag in tags} - {UNLABELLED}
    return {tuple(value) if isinstance(value, list) else value for value in rows["label"]}


def _numbers(found: set[Any]) -> set[int]:
    """Numbers of the classes in what is distinct."""
    return {
        number
        for value in found
        for number in ([place for place, holds in enumerate(value) if holds] if isinstance(value, tuple) else [value])
    }


def _told(labels: Sequence[str], *found: Any) -> str:
    return ", ".join(repr(labels[number]) for number in sorted(_numbers({*found}))) or "none"
