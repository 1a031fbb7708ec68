"""Station 2, for tasks: answers whose place in the context is wrong are found again, or not learned from."""

import logging
from typing import Any

from datasets import Dataset

logger = logging.getLogger(__name__)

LOST = -1
"""Where an answer begins whose text is not in the context, or is there more than once."""


def mend_places(rows: Dataset, where: str, drop: bool) -> Dataset:
    """`rows` whose answers stand where they say.

    An answer that is not at its place is looked for: where its text is in the context once, it is there. Others are
    lost. A row that has lost all its answers is left out with `drop`; else it keeps their texts, which are measured.

    Args:
        rows: with `context` and `answers`.
        where: what the log calls them.
        drop: whether they are for training.
    """
    mended = lost = doubtful = 0
    kept: list[int] = []
    columns: list[dict[str, Any]] = []
    for number, (context, answers) in enumerate(zip(rows["context"], rows["answers"], strict=True)):
        texts, starts = list(answers["text"]), list(answers["answer_start"])
        starts += [LOST] * (len(texts) - len(starts))
        found = [_find(context, text, start) for text, start in zip(texts, starts, strict=False)]
        mended += any(place not in (LOST, start) for place, start in zip(found, starts, strict=False))
        if texts and set(found) == {LOST}:
            lost += 1
            if drop:
                continue
        doubtful += bool(texts) and len({*found}) > 1 and found[0] == LOST
        order = [i for i in range(len(texts)) if found[i] != LOST]  # the first one is learned
        order += [i for i in range(len(texts)) if found[i] == LOST]
        kept.append(number)
        columns.append({"text": [texts[i] for i in order], "answer_start": [found[i] for i in order]})
    if mended:
        logger.warning("%d rows of %s had an answer that is not at its answer_start; it was found again", mended, where)
    if lost:
        logger.warning(
            "%d rows of %s have an answer that is not at its answer_start, nor in the context just once; %s",
            lost,
            where,
            "they are left out" if drop else "they are measured by its text alone",
        )
    if doubtful:
        logger.warning(
            "%d rows of %s have a first answer that is not in the context; another of theirs is learned",
            doubtful,
            where,
        )
    if not mended and not lost and not doubtful:
        return rows
    feature = rows.features["answers"]
    rows = rows if len(kept) == len(rows) else rows.select(kept)
    return rows.remove_columns("answers").add_column("answers", columns, feature=feature)


def _find(context: str, text: str, start: int | None) -> int:
    if start is not None and start >= 0 and context[start : start + len(text)] == text:
        return start
    first = context.find(text)
    return first if text and first >= 0 and context.find(text, first + 1) < 0 else LOST
