"""Official metrics, by kind of task. All are shares or correlations: 1 is perfect (leaderboards write 100).

A metric takes what was predicted and what is true, in the same order: classes or numbers (arrays), of several labels or
outputs a row one column each; lists of tags; or an answer and the list of true answers of each question.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, r2_score

from makd.registry import Registry
from makd.tasks.answers import answer_f1, exact_match
from makd.tasks.entities import entities, precision_recall_f1
from makd.words import Words, words_of

Metric = Callable[[Any, Any], float]


def _accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(accuracy_score(true, predicted))


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """Of class 1 of two, as GLUE has it."""
    return float(f1_score(true, predicted, zero_division=0))


def _macro_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(f1_score(true, predicted, average="macro", zero_division=0))


def _matthews(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(matthews_corrcoef(true, predicted))


def _micro_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(f1_score(true, predicted, average="micro", zero_division=0))


def _correlation(of: Callable[[np.ndarray, np.ndarray], Any]) -> Metric:
    """A correlation; of several outputs their mean."""

    def metric(predicted: np.ndarray, true: np.ndarray) -> float:
        columns = zip(_columns(predicted), _columns(true), strict=True)
        found = [0.0 if _is_constant(ours, theirs) else float(of(ours, theirs).statistic) for ours, theirs in columns]
        return sum(found) / len(found)

    return metric


def _columns(values: np.ndarray) -> list[np.ndarray]:
    return [values] if values.ndim == 1 else list(values.T)


def _r2(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(r2_score(true, predicted)) if len(true) > 1 else 0.0


def _is_constant(*sides: np.ndarray) -> bool:
    """Whether there is no correlation to speak of: scipy would warn and give NaN."""
    return any(len(side) < 2 or bool(np.all(side == side[0])) for side in sides)


def _entity(which: int) -> Metric:
    def metric(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> float:
        return precision_recall_f1(entities(predicted), entities(true))[which]

    return metric


def _token_accuracy(predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]]) -> float:
    pairs = [pair for ours, theirs in zip(predicted, true, strict=True) for pair in zip(ours, theirs, strict=True)]
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def _answers(score: Callable[[str, Sequence[str], Words], float], answerable: bool | None = None) -> Metric:
    """The mean of a score over questions: all, or those that have an answer, or have none."""

    def metric(predicted: Sequence[str], true: Sequence[Sequence[str]]) -> float:
        kind = words_of(true)
        chosen = [
            score(ours, theirs, kind)
            for ours, theirs in zip(predicted, true, strict=True)
            if answerable is None or answerable == bool(theirs)
        ]
        return sum(chosen) / len(chosen)

    return metric


OF_SOME = {"answerable_f1": True, "unanswerable_f1": False}
"""Metrics of some questions alone -> whether these have an answer."""

METRICS: dict[str, Registry[Metric]] = {
    "classification": Registry(
        "metric of a classification",
        {"accuracy": _accuracy, "f1": _f1, "macro_f1": _macro_f1, "matthews": _matthews},
    ),
    "multi_label": Registry(
        "metric of several labels a row",
        {"micro_f1": _micro_f1, "macro_f1": _macro_f1, "subset_accuracy": _accuracy},
    ),
    "regression": Registry(
        "metric of a regression",
        {"pearson": _correlation(pearsonr), "spearman": _correlation(spearmanr), "r2": _r2},
    ),
    "token_classification": Registry(
        "metric of a token classification",
        {
            "entity_f1": _entity(2),
            "entity_precision": _entity(0),
            "entity_recall": _entity(1),
            "token_accuracy": _token_accuracy,
        },
    ),
    "question_answering": Registry(
        "metric of question answering",
        {
            "f1": _answers(answer_f1),
            "exact_match": _answers(exact_match),
            **{name: _answers(answer_f1, answerable=which) for name, which in OF_SOME.items()},
        },
    ),
}
"""Kind of task -> its metrics by name."""

SCORES: dict[str, tuple[str, ...]] = {"token_classification": ("entity_f1",), "question_answering": ("f1",)}
"""Kinds whose score is not the mean of all that is measured, but of these, where they are measured."""


def measurable(names: Sequence[str], true: Any) -> list[str]:
    """Those of `names` that there is something to measure of.

    The F1 of questions without an answer is left out where all have one, and vice versa, as SQuAD 2.0's script does.

    Args:
        names: of metrics.
        true: what is true, as metrics take it.
    """
    return [name for name in names if name not in OF_SOME or any(bool(one) == OF_SOME[name] for one in true)]


def scored(kind: str, names: Iterable[str]) -> list[str]:
    """Those of the metrics `names` that a score is the mean of: all, as GLUE averages them, or those in `SCORES`."""
    measured = list(names)
    return [name for name in SCORES.get(kind, ()) if name in measured] or measured


def score(kind: str, found: dict[str, float]) -> float:
    """One number for a task: the mean of its metrics that are `scored`."""
    counted = scored(kind, found)
    return sum(found[name] for name in counted) / len(counted)
