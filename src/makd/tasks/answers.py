"""Answers in texts: SQuAD's official comparison of two, and from a model's logits to one.

Normalisation and scores are those of the evaluation scripts of SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016 and 2018); in
other scripts than theirs, which know neither foreign punctuation nor words without spaces, words are `makd.words`'.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from makd.words import Words, is_joined, unicode_words

CANDIDATES = 20
"""Starts and ends of each window that are paired: transformers' `run_qa.py`."""


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space, in this order."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def exact_match(predicted: str, true: Sequence[str], kind: Words = "english") -> float:
    """1 where `predicted` has the words of one of the true answers; a question without any has one without words."""
    return max(float(_words(predicted, kind) == answer) for answer in _with_words(true, kind))


def answer_f1(predicted: str, true: Sequence[str], kind: Words = "english") -> float:
    """The best F1 of words with one of the true answers. Where there is none: 1 if `predicted` has no words, else 0."""
    return max(_words_f1(_words(predicted, kind), answer) for answer in _with_words(true, kind))


def _words(text: str, kind: Words) -> list[str]:
    return normalise_answer(text).split() if kind == "english" else unicode_words(text)


def _with_words(true: Sequence[str], kind: Words) -> list[list[str]]:
    """The words of the true answers that have some; one without where there are none, as SQuAD 2.0's script has it.

    (SQuAD has "." among the answers to a few questions; a model that says nothing is not right there.)
    """
    return [words for answer in true if (words := _words(answer, kind))] or [[]]


def _words_f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def best_answer(
    context: str, windows: Sequence[Mapping[str, Any]], starts: Sequence[np.ndarray], ends: Sequence[np.ndarray],
    longest: int, may_be_none: bool,
) -> str:  # fmt: skip
    """The likeliest stretch of `context`; "" where none is likelier and `may_be_none`, or none is possible.

    Args:
        context: of one question.
        windows: its tokenized windows; `offsets` are each token's [first, last + 1] letter in the context, [-1, -1] for
            tokens that are not of it; `first` is the place of the token that stands for "no answer".
        starts: logits of each window's tokens.
        ends: the same.
        longest: tokens that an answer may have.
        may_be_none: whether the question may have no answer. "No answer" is as likely as in the window where it is
            least so (`run_qa.py`).
    """
    best, answer, none = -np.inf, "", np.inf
    for window, start, end in zip(windows, starts, ends, strict=True):
        offsets = np.asarray(window["offsets"])
        none = min(none, float(start[window["first"]] + end[window["first"]]))
        places = np.flatnonzero(offsets[:, 0] >= 0)
        firsts = places[np.argsort(-start[places], kind="stable")[:CANDIDATES]]
        lasts = places[np.argsort(-end[places], kind="stable")[:CANDIDATES]]
        length = lasts[None, :] - firsts[:, None] + 1
        scores = np.where((length >= 1) & (length <= longest), start[firsts][:, None] + end[lasts][None, :], -np.inf)
        if scores.size and scores.max() > best:
            row, column = np.unravel_index(int(scores.argmax()), scores.shape)
            best = float(scores[row, column])
            answer = context[offsets[firsts[row], 0] : _with_marks(context, offsets[lasts[column], 1])]
    return "" if may_be_none and none > best else answer


def _with_marks(context: str, end: int) -> int:
    """Behind the marks that belong to the letter before `end`: a tokenizer that drops accents has no token for them."""
    while end < len(context) and is_joined(context[end]):
        end += 1
    return end
