"""Station 7: how long rows are in a training, by which its batches are made and its memory is forecast."""

from typing import Any

from makd.aspects import Completions
from makd.data import has_completions, row_lengths
from makd.data.prompts import written_lengths


def training_lengths(rows: Any, completions: Completions, limit: int | None) -> list[int]:
    """Tokens of each row of a training, by which batches are made: at most, where completions are written.

    Args:
        rows: to train on.
        completions: who writes them.
        limit: tokens that a row of the models may have.

    Raises:
        DataError: completions are written, and a row holds none in whose place they could stand.
    """
    if not completions.written or not has_completions(rows):  # which is refused elsewhere
        return row_lengths(rows)
    return written_lengths(rows, completions.max_new_tokens, limit)
