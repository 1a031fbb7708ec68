"""What a word is, in any script: of answers that are compared by their words. Stands below every station.

Published rules are for English: rouge-score's words are runs of a-z and 0-9, SQuAD's stand between blanks, in ASCII's
punctuation. By them an answer in Russian or Greek has no words at all, and one in Chinese a single one.
"""

import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import Literal

Words = Literal["english", "unicode"]
FOREIGN = 0.1
"""Share of the references' letters that are none of a-z, or of the rows most of whose letters are none, from which on
words are Unicode's. Below, numbers stay what published scripts give: an accent here and there is no other script."""
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""Scripts that put no spaces between words, as the names of their characters begin: each is a word."""


ZERO_WIDTH_JOINER = "\u200d"
"""No mark by its category; it joins letters of Indic scripts, and emoji."""


def words_of(references: Sequence[Sequence[str]]) -> Words:
    """What counts as a word beside these references of each row: what it does in English, or in any script.

    One rule is for all rows, so that numbers are of one kind.
    """
    counts = [(sum(map(len, letters)), sum(map(_foreign, letters))) for letters in map(_letters, references)]
    counts = [(letters, foreign) for letters, foreign in counts if letters]
    letters, foreign = (sum(side) for side in zip(*counts, strict=True)) if counts else (0, 0)
    rows = sum(2 * foreign > letters for letters, foreign in counts)
    return "unicode" if foreign and (foreign >= FOREIGN * letters or rows >= FOREIGN * len(counts)) else "english"


def unicode_words(text: str) -> list[str]:
    """Runs of letters, marks and digits, without case; of scripts without spaces each character. Nothing is stemmed."""
    text = unicodedata.normalize("NFC", text).casefold()
    found: list[str] = []
    for kind, letters in groupby(text, _kind):
        run = "".join(letters)
        found += [] if kind == "between" else run if kind == "unspaced" else [run]
    return found


def word_begin(text: str, place: int) -> int:
    """Where the word begins that ends at `place`, or goes on there; of scripts without spaces, `place` itself."""
    while place and not text[place - 1].isspace() and not _is_unspaced(text[place - 1]):
        place -= 1
    return place


def is_joined(letter: str) -> bool:
    """Whether `letter` is part of what stands before it: a mark, or a joiner of emoji and of Indic letters."""
    return unicodedata.category(letter)[0] == "M" or letter == ZERO_WIDTH_JOINER


def _letters(several: Sequence[str]) -> list[str]:
    return ["".join(filter(str.isalpha, one)) for one in several]


def _foreign(letters: str) -> int:
    return sum(not letter.isascii() for letter in letters)


def _kind(letter: str) -> Literal["between", "unspaced", "word"]:
    if unicodedata.category(letter)[0] not in "LMN":
        return "between"
    return "unspaced" if _is_unspaced(letter) else "word"


def _is_unspaced(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(_UNSPACED)
