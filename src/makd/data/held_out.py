"""Station 2, continued: which rows are held out, where the data have no split to evaluate on.

What a row says decides, and nothing else: not the seed, nor where it stands, nor how many others there are. So a text
that stands twice is on one side, as are all answers to a question, and no run holds out what another has learned from:
a measurement of other `rows` of the data, or a run that goes on when more were written behind them.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence

from datasets import Dataset

from makd.data.conversations import MESSAGES, Message
from makd.errors import DataError

logger = logging.getLogger(__name__)

HELD_OUT_SEED = 0
"""Of the order of rows that are measured on, and of which of them where not all are: the same for all students."""
TOLD = 0.01
"""Share of the text to evaluate on that may be among what is trained on before that is a warning."""


def split_off(
    rows: Dataset, share: float, setting: str, columns: Sequence[str] | None = None, purpose: str = ""
) -> tuple[Dataset, Dataset]:
    """The rows to train on, and about `share` of them, at least one, to evaluate on: the same ones in every run.

    A row is held out if its digest, as a number in [0, 1), is below `share`.

    Args:
        rows: all of them.
        share: in (0, 1).
        setting: what it is called, for errors.
        columns: what rows that are alike have in common; None for all. Labels are no part of it.
        purpose: what they are held out for, if for another than to be measured on: its rows are chosen independently.

    Raises:
        DataError: there are fewer than two, or none would be left to train on.
    """
    if len(rows) < 2:
        raise DataError(f"There are {len(rows)} rows; at least 2 are needed, one of them to evaluate on.")
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise DataError(
            f"{setting} = {share} of {len(rows)} rows are all of them, which leaves none to train on. Lower it, or "
            "give more rows."
        )
    places = [_place(purpose.encode() + said) for said in _said(rows, columns)]
    different = sorted(set(places))
    if len(different) == 1:
        logger.warning("All %s rows say the same: those that are held out are learned from, too", f"{len(rows):,}")
        return rows.select(range(count, len(rows))), rows.select(range(count))
    held = {place for place in different[:-1] if place < share} or {different[0]}
    evaluation = sorted((place, index) for index, place in enumerate(places) if place in held)
    train = rows.select([index for index, place in enumerate(places) if place not in held])
    return train.shuffle(seed=HELD_OUT_SEED), rows.select([index for _, index in evaluation])


def log_rows_seen(train: Dataset, evaluation: Dataset, where: str, columns: Sequence[str] | None = None) -> None:
    """Log how many rows of a split to evaluate on are among those to train on, word for word."""
    if columns is None and set(train.column_names) != set(evaluation.column_names):
        return
    learned = _places(train, columns)
    texts = list(_said(evaluation, columns))
    seen = [said for said in texts if _place(said) in learned]
    if seen:
        share = sum(map(len, seen)) / sum(map(len, texts))
        logger.log(
            logging.WARNING if share >= TOLD else logging.INFO,
            "%s: %s of %s rows to evaluate on, %.1f %% of their text, are among those to train on, word for word",
            where, f"{len(seen):,}", f"{len(texts):,}", 100 * share,
        )  # fmt: skip


def leave_out(rows: Dataset, measured: Dataset, columns: Sequence[str] | None = None) -> Dataset:
    """`rows` without those that are among the rows to evaluate on, word for word.

    Args:
        rows: to train on, of another source than `measured`: what is held out of one source is in none of its rows.
        measured: the rows to evaluate on.
        columns: what rows that are alike have in common, which both have; None for all.
    """
    kept_out = _places(measured, columns)
    return rows.select([index for index, said in enumerate(_said(rows, columns)) if _place(said) not in kept_out])


def log_prompts_seen(train: Dataset, prompts: Sequence[list[Message]], where: str) -> None:
    """Log how many prompts that models are to answer are among those that are trained on.

    Args:
        train: rows to train on; only of conversations there is something to tell.
        prompts: conversations up to where the answer is due.
        where: the prompts are.
    """
    if MESSAGES not in train.column_names:
        return
    learned = _places(train, [MESSAGES])
    seen = sum(_place(json.dumps([prompt], sort_keys=True).encode()) in learned for prompt in prompts)
    if seen:
        logger.warning(
            "%s: %s of %s prompts are among those to train on, word for word: answers to them say little of others",
            where, f"{seen:,}", f"{len(prompts):,}",
        )  # fmt: skip


def _said(rows: Dataset, columns: Sequence[str] | None) -> Iterator[bytes]:
    """Of each row what it says."""
    chosen = sorted(rows.column_names if columns is None else columns)
    if MESSAGES in chosen:
        chosen = [MESSAGES]  # what stands beside it is made of it
    for batch in rows.select_columns(chosen).iter(1000):
        for row in zip(
            *(map(_asked, batch[name]) if name == MESSAGES else batch[name] for name in chosen), strict=True
        ):
            yield json.dumps(row, sort_keys=True, default=str).encode()


def _places(rows: Dataset, columns: Sequence[str] | None) -> set[float]:
    return {_place(said) for said in _said(rows, columns)}


def _place(said: bytes) -> float:
    """Its digest, as a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(said, digest_size=6).digest(), "big") / 2**48


def _asked(messages: list[Message]) -> list[Message]:
    """A conversation before its last answer; all of it where that is nothing."""
    last = max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    return messages[:last] if any(message["content"].strip() for message in messages[:last]) else messages
