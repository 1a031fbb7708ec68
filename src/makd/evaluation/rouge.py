"""Station 8: ROUGE-L of answers (Lin, 2004), in any script (`makd.words`)."""

import logging
import statistics
from collections.abc import Sequence
from typing import Any

from makd.words import unicode_words, words_of

logger = logging.getLogger(__name__)


def mean_rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """100 x the mean over rows of the best F1 of ROUGE-L over a row's references.

    With references without a word by the rule that all rows have, such as an emoji, or a Thai one beside twenty English
    ones, an answer is right as a whole or not at all.
    """
    from rouge_score.rouge_scorer import RougeScorer

    words = _words_beside(references)
    scorer = RougeScorer(["rougeL"], tokenizer=words)
    best = []
    for text, several in zip(texts, references, strict=True):
        whole = [reference for reference in several if not words.tokenize(reference)]
        scores = [scorer.score(reference, text)["rougeL"].fmeasure for reference in several]
        best.append(max(*scores, float(any(one.strip() == text.strip() for one in whole)), 0.0))
    return 100 * statistics.fmean(best)


def warn_wordless(references: Sequence[Sequence[str]]) -> None:
    """Tell how many rows have a reference without a word, if any has."""
    words = _words_beside(references)
    wordless = sum(not all(map(words.tokenize, several)) for several in references)
    if wordless:
        logger.warning(
            "%d of %d rows have a reference without a word that ROUGE-L knows: an answer is all right if it is the "
            "same, else all wrong",
            wordless, len(references),
        )  # fmt: skip


def _words_beside(references: Sequence[Sequence[str]]) -> Any:
    """The words of all rows, as `RougeScorer` asks for them."""
    from rouge_score.tokenizers import DefaultTokenizer

    return _UnicodeWords() if words_of(references) == "unicode" else DefaultTokenizer(use_stemmer=True)


class _UnicodeWords:
    """What `RougeScorer` asks for words."""

    def tokenize(self, text: str) -> list[str]:
        """The words of `text`, in order."""
        return unicode_words(text)
