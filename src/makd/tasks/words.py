"""Station 2, for tasks: rows of words as the tokens of their text, in windows where they are long.

Words are joined by spaces and read as text: what is taught and measured is what a reader of text will meet, whatever a
tokenizer does with words that come one by one (a byte-level one joins them, without `add_prefix_space`).
"""

import logging
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from datasets import Dataset, List, Value
from transformers import PreTrainedTokenizerBase

from makd.anatomy.tokens import IGNORE_INDEX
from makd.data.unknown import Known, KnownTokens, check_known
from makd.errors import DataError
from makd.mapped import map_rows
from makd.tasks.settings import TaskConfig

logger = logging.getLogger(__name__)

NO_WORD = -1
"""In the column `words`: a token that stands for no word."""

Place = tuple[int, int]
"""A window of a row, and a token in it."""


def encode_words(config: TaskConfig, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Windows of `config.length` tokens over each row's words, with a tag for each word's first piece.

    A word that is in several windows has its tag where it has most context on either side, and nowhere else. `row` is
    the row that a window is of; `words` says which word a token has the tag of.

    Raises:
        DataError: the tokenizer does not say where in a text its tokens are, or knows nearly nothing of the words.
    """
    if not tokenizer.is_fast:
        raise DataError(f"{config.name} needs a fast tokenizer, which says where in the text each token stands.")
    overlap = min(config.stride, config.length // 4)

    def windows(batch: Mapping[str, Any], numbers: list[int]) -> dict[str, Any]:
        texts = [" ".join(words) for words in batch["tokens"]]
        encoded = tokenizer(
            texts, truncation=True, max_length=config.length, stride=overlap,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        of = encoded["overflow_to_sample_mapping"]
        made: dict[str, list[Any]] = {"labels": [], "words": [], "row": [numbers[row] for row in of]}
        for row, words in enumerate(batch["tokens"]):
            own = [window for window, sample in enumerate(of) if sample == row]
            pieces = [_words_of(encoded, window, texts[row], words) for window in own]
            tags = batch["tags"][row] if "tags" in batch else None
            for line in _first_pieces(pieces):
                made["words"].append([NO_WORD if word is None else word for word in line])
                made["labels"].append(
                    [IGNORE_INDEX if word is None or tags is None or tags[word] < 0 else tags[word] for word in line]
                )
        return {
            name: encoded[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded
        } | made

    encoded = map_rows(rows, windows, batched=True, with_indices=True, remove_columns=rows.column_names)
    check_known(Known.sum(map(KnownTokens(tokenizer).count, encoded["input_ids"])), tokenizer)
    missed = sum(map(len, rows["tokens"])) - sum(word != NO_WORD for line in encoded["words"] for word in line)
    if missed:
        logger.warning(
            "%d words of %d rows have no token of their own: the tokenizer drops them, or joins them with the word "
            "before. They are not learned, and count as O where they are measured.",
            missed,
            len(rows),
        )
    return encoded.cast_column("labels", List(Value("int64")))


def _words_of(encoded: Any, window: int, text: str, words: Sequence[str]) -> list[tuple[int, int] | None]:
    """For each token of a window its word and the letter where it begins, without spaces before it."""
    starts = [0, *accumulate(len(word) + 1 for word in words)][: len(words)]
    found: list[tuple[int, int] | None] = []
    for part, (first, last) in zip(encoded.sequence_ids(window), encoded["offset_mapping"][window], strict=True):
        while first < last and text[first].isspace():
            first += 1
        found.append(None if part is None or first >= last else (bisect_right(starts, first) - 1, first))
    return found


def _first_pieces(windows: Sequence[Sequence[tuple[int, int] | None]]) -> list[list[int | None]]:
    """For each token of each window the word that it has the tag of."""
    begins: dict[int, int] = {}
    for pieces in windows:
        for piece in pieces:
            if piece is not None:
                begins[piece[0]] = min(begins.get(piece[0], piece[1]), piece[1])
    best: dict[int, tuple[float, Place]] = {}
    for window, pieces in enumerate(windows):
        real = [place for place, piece in enumerate(pieces) if piece is not None]
        for order, place in enumerate(real):
            word, letter = pieces[place]  # type: ignore[misc]
            before = pieces[real[order - 1]] if order else None
            if letter != begins[word] or (before is not None and before[0] == word):
                continue
            left = float("inf") if window == 0 else order
            right = float("inf") if window == len(windows) - 1 else len(real) - 1 - order
            if word not in best or min(left, right) > best[word][0]:
                best[word] = min(left, right), (window, place)
    found: list[list[int | None]] = [[None] * len(pieces) for pieces in windows]
    for word, (_, (window, place)) in best.items():
        found[window][place] = word
    return found
