"""Entities in sequences of tags, as the CoNLL-2000 evaluation script (conlleval) and seqeval read them.

A chunk begins where the tags say so, and also where they should have: `O I-PER` and `I-LOC I-PER` begin one at `I-PER`.
Tags are `O`, or a letter and a type: `B-`, `I-`, and of the schemes IOBES and BILOU also `E-`, `L-`, `S-` and `U-`.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Entity(NamedTuple):
    """A typed stretch of tokens of one row; `end` is the last token."""

    row: int
    type: str
    start: int
    end: int


def entities(rows: Sequence[Sequence[str]]) -> set[Entity]:
    """All entities in the tags of `rows`."""
    found = set()
    for row, tags in enumerate(rows):
        before, type_before, start = "O", "", 0
        for place, tag in enumerate([*tags, "O"]):
            letter, _, kind = tag.partition("-")
            if _ends(before, letter, type_before, kind):
                found.add(Entity(row, type_before, start, place - 1))
            if _begins(before, letter, type_before, kind):
                start = place
            before, type_before = letter, kind
    return found


def precision_recall_f1(predicted: set[Entity], true: set[Entity]) -> tuple[float, float, float]:
    """Of exact matches, over all types together; 0 where nothing was predicted, or nothing was there."""
    hits = len(predicted & true)
    precision = hits / len(predicted) if predicted else 0.0
    recall = hits / len(true) if true else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


def _ends(before: str, letter: str, type_before: str, kind: str) -> bool:
    """Whether a chunk ends between two tags."""
    if before == "O":
        return False
    return before in "ESLU" or letter in "BSUO" or kind != type_before


def _begins(before: str, letter: str, type_before: str, kind: str) -> bool:
    """Whether a chunk begins at the second of two tags."""
    if letter == "O":
        return False
    return letter in "BSU" or before in "ESLUO" or kind != type_before
