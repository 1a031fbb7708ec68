"""Station 8: ROUGE-L of answers (Lin, 2004), in any script.

rouge-score's own words are runs of a-z and 0-9, stemmed: in Russian, Greek or Chinese an answer has none, and even its
own reference scores 0. Where references have letters of other scripts, words are what Unicode says they are.
"""

import statistics
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Literal

Words = Literal["english", "unicode"]
FOREIGN = 0.1
"""Share of the references' letters that are none of a-z, from which on words are Unicode's. Below, numbers stay what
rouge-score gives, as papers report them: an accent here and there is no other script."""
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
"""Scripts that put no spaces between words, as the names of their characters begin: each is a word."""


def mean_rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """100 x the mean over rows of the best F1 of ROUGE-L over a row's references."""
    from rouge_score.rouge_scorer import RougeScorer

    kind = words_of(reference for several in references for reference in several)
    scorer = RougeScorer(["rougeL"], use_stemmer=True, tokenizer=_UnicodeWords() if kind == "unicode" else None)
    best = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in several)
        for text, several in zip(texts, references, strict=True)
    ]
    return 100 * statistics.fmean(best)


def words_of(references: Iterable[str]) -> Words:
    """What counts as a word beside these references: rouge-score's, or runs of letters and digits of any script."""
    letters = [letter for reference in references for letter in reference if letter.isalpha()]
    foreign = sum(not letter.isascii() for letter in letters)
    return "unicode" if foreign and foreign >= FOREIGN * len(letters) else "english"


class _UnicodeWords:
    """What `RougeScorer` asks for words: runs of letters, marks and digits, without case; nothing is stemmed."""

    def tokenize(self, text: str) -> list[str]:
        """The words of `text`, in order."""
        text = unicodedata.normalize("NFC", text).casefold()
        found: list[str] = []
        for kind, letters in groupby(text, _kind):
            run = "".join(letters)
            found += [] if kind == "between" else run if kind == "unspaced" else [run]
        return found


def _kind(letter: str) -> Literal["between", "unspaced", "word"]:
    if unicodedata.category(letter)[0] not in "LMN":
        return "between"
    return "unspaced" if unicodedata.name(letter, "").startswith(_UNSPACED) else "word"
