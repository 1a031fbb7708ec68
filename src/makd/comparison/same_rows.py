"""Station 10: whether cells that are done learned from, and were measured on, the rows that the next ones would.

Settings and files say where rows come from. What is made of them also hangs on the versions of makd (which rows are
held out), of tokenizers and datasets, and of what a hub id names. So each line notes digests of the tokens themselves,
and cells of other rows are not put beside it.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from makd.comparison.language_rows import LanguageRows
from makd.distill.identity import hash_all_columns
from makd.errors import OutputError
from makd.tasks import Task

logger = logging.getLogger(__name__)

LEARNED, MEASURED = "learned_from", "measured_on"
"""What a line's `rows` has digests of: rows of one seed, in their order; rows that are the same for all seeds."""


def rows_digests(rows: Task | LanguageRows) -> dict[str, str]:
    """Digests of what students learn from, and of what they are measured on: token ids, masks, labels, prompts."""
    measured = hashlib.sha256()
    if isinstance(rows, LanguageRows):
        for batch in (batch for kind in sorted(rows.texts) for batch in rows.texts[kind]):
            for name in sorted(batch):
                measured.update(f"{name} {tuple(batch[name].shape)}\n".encode())
                measured.update(batch[name].cpu().numpy().astype(np.int64).tobytes())
        for name in sorted(rows.prompts):
            measured.update(repr((name, rows.prompts[name].ids)).encode())
    else:
        for parts in (rows.evaluation, rows.references):
            for split in sorted(parts):
                measured.update(f"{split} {hash_all_columns(parts[split])}\n".encode())
    return {LEARNED: hash_all_columns(rows.distillation)[:16], MEASURED: measured.hexdigest()[:16]}


def check_rows(lines: Iterable[Mapping[str, Any]], seed: int, found: Mapping[str, str], file: Path) -> None:
    """Refuse to put cells beside `lines` that are of other rows.

    Args:
        lines: of the cells of their task that are done.
        seed: of the cells to run.
        found: digests of their rows.
        file: that has the lines.

    Raises:
        OutputError: a line was measured on other rows, or one of the seed has learned from others.
    """
    for line in lines:
        for part, digest in line.get("rows", {}).items():
            if found[part] != digest and (part == MEASURED or line["cell"]["seed"] == seed):
                raise OutputError(
                    f"{_named(line)} {_DONE[part]} other rows than there are now, and cells of both would stand in one "
                    "table. The settings are the same, and so are the files on this machine: the rows are chosen or "
                    "read in another way, by another version of makd, tokenizers or datasets, or of what a hub id "
                    f"names. Name another output; or take the lines of that task out of {file}."
                )


def tell_unknown(lines: Iterable[Mapping[str, Any]], file: Path) -> None:
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
    """Refuse to make a table of lines that were measured on different rows of a task.

    Raises:
        OutputError: they were.
    """
    first: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        if "rows" in line:
            other = first.setdefault(line["cell"]["task"], line)
            if line["rows"][MEASURED] != other["rows"][MEASURED]:
                raise OutputError(
                    f"{_named(line)} and {_named(other)} were measured on different rows, and have no place in one "
                    f"table: rows.{MEASURED} of their lines differ. Take out those that are not meant."
                )


_DONE = {LEARNED: "has learned from", MEASURED: "was measured on"}


def _named(line: Mapping[str, Any]) -> str:
    return "cell " + "  ".join(map(str, line["cell"].values()))
