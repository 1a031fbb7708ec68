"""Station 10: whether cells that are done had the teacher, and the rows, that the next ones would have.

Settings and files say where rows come from. What is made of them also hangs on the versions of makd (which rows are
held out), of tokenizers and datasets, and of what a hub id names. And a teacher that was
fine-tuned for a comparison is another one where it is made again on another machine, or by other versions. So each line
notes digests of the tokens, and of the teacher's weights, and cells of others are not put beside it.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from makd.cache.identity import hash_weights
from makd.comparison.cells import cell_name
from makd.comparison.language_rows import LanguageRows
from makd.distill.resuming.identity import hash_all_columns, hash_splits
from makd.errors import OutputError
from makd.tasks import Task

logger = logging.getLogger(__name__)

LEARNED, MEASURED, TAUGHT = "learned_from", "measured_on", "taught_by"
"""What a line's `rows` has digests of: rows of one seed, in their order; rows that are the same for all seeds; the
teacher of a seed. Lines from before teachers were noted lack the last."""


def rows_digests(rows: Task | LanguageRows, teacher: PreTrainedModel) -> dict[str, str]:
    """Digests of what students learn from, and of what they are measured on: token ids, masks, labels, prompts.

    And of the teacher's weights, in the dtype that it runs in.
    """
    measured = _hash_texts(rows) if isinstance(rows, LanguageRows) else hash_splits(rows.evaluation, rows.references)
    return {
        LEARNED: hash_all_columns(rows.distillation)[:16],
        MEASURED: measured[:16],
        TAUGHT: hash_weights(teacher)[:16],
    }


def _hash_texts(rows: LanguageRows) -> str:
    found = hashlib.sha256()
    for batch in (batch for kind in sorted(rows.texts) for batch in rows.texts[kind]):
        for name in sorted(batch):
            found.update(f"{name} {tuple(batch[name].shape)}\n".encode())
            found.update(batch[name].cpu().numpy().astype(np.int64).tobytes())
    for name in sorted(rows.prompts):
        found.update(repr((name, rows.prompts[name].ids)).encode())
    return found.hexdigest()


def check_rows(lines: Iterable[Mapping[str, Any]], seed: int, found: Mapping[str, str], file: Path) -> None:
    """Refuse to put cells beside `lines` that are of other rows.

    Args:
        lines: of the cells of their task that are done.
        seed: of the cells to run.
        found: digests of their rows and of their teacher.
        file: that has the lines.

    Raises:
        OutputError: a line was measured on other rows, or one of the seed has learned from others or had another
            teacher.
    """
    for line in lines:
        for part, digest in line.get("rows", {}).items():
            if found[part] != digest and (part == MEASURED or line["cell"]["seed"] == seed):
                raise OutputError(
                    f"{_named(line)} {_DONE[part]} now, and cells of both would stand in one table. The settings are "
                    f"the same: {_WHY[part]}. Name another output; or take the lines of that task"
                    f"{' and seed' if part == TAUGHT else ''} out of {file}."
                )


def check_trials(trials: Iterable[Mapping[str, Any]], cell: str, found: Mapping[str, str], file: Path) -> None:
    """Refuse to go on with a search whose trials are of other rows, or of another teacher.

    Raises:
        OutputError: a trial is of other rows, or of another teacher.
    """
    for trial in trials:
        other = [part for part, digest in trial.get("rows", {}).items() if found[part] != digest]
        if other:
            raise OutputError(
                f"Trial {trial['trial']} of {cell} {_DONE[other[0]]} now, and a search would choose between both. The "
                f"settings are the same: {_WHY[other[0]]}. Name another output; or take its trials out of {file}."
            )


def warn_without_digests(lines: Iterable[Mapping[str, Any]], file: Path) -> None:
    """Warn of lines from before there were digests."""
    tasks = [line["cell"]["task"] for line in lines if "rows" not in line]
    if tasks:
        logger.warning(
            "%s: %d cells (%s) do not say which rows they were measured on: they are from before makd noted it. Since "
            "then it chooses in another way which rows are held out where data have no split for evaluation; run such "
            "cells again in another output",
            file, len(tasks), ", ".join(dict.fromkeys(tasks)),
        )  # fmt: skip


def check_alike(lines: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to make a table of lines that were measured on different rows of a task, or had different teachers.

    Raises:
        OutputError: cells of one task have different rows, or those of one seed different teachers.
    """
    first: dict[object, Mapping[str, Any]] = {}
    for line in lines:
        names, rows = line["cell"], line.get("rows", {})
        for part, key in ((MEASURED, (names["task"],)), (TAUGHT, (names["task"], names["seed"]))):
            other = first.setdefault((part, key), line) if part in rows else line
            if rows.get(part) != other.get("rows", {}).get(part):
                raise OutputError(
                    f"{_named(line)} and {_named(other)} {_BOTH[part]}, and have no place in one table: rows.{part} of "
                    "their lines differ. Take out those that are not meant."
                )


_BOTH = {MEASURED: "were measured on different rows", TAUGHT: "had different teachers"}
_DONE = {
    LEARNED: "has learned from other rows than there are",
    MEASURED: "was measured on other rows than there are",
    TAUGHT: "had another teacher than there is",
}
_OTHER_ROWS = (
    "the rows are chosen or read in another way, by another version of makd, tokenizers or datasets, or of what a hub "
    "id names"
)
_WHY = {
    LEARNED: _OTHER_ROWS,
    MEASURED: _OTHER_ROWS,
    TAUGHT: "the teacher was made again, on another machine or by other versions, or a hub id names another one",
}


def _named(line: Mapping[str, Any]) -> str:
    return f"cell {cell_name(line['cell'])}"
