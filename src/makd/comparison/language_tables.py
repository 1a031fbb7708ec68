"""Station 10: the table of a language model's comparison: every metric, of teacher and students."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from makd.comparison.settings import Experiment
from makd.comparison.statistics import mean
from makd.comparison.tables import Lines
from makd.run_folder.text_table import TextTable

LANGUAGE_SCORE = "what is left of the teacher's probability of a token"
"""The score, for a person."""

KINDS = {"perplexity": "perplexity", "gap": "gap, nats", "agreement": "agreement, %", "rouge_l": "ROUGE-L"}
"""How a metric's name begins -> its name for a person. The rest says on what."""


def language_tables(experiment: Experiment, lines: Lines) -> list[TextTable]:
    """Metrics of one budget, a table for each of the experiment's `language` that has lines."""
    tables = []
    for language in experiment.language:
        own = [line for line in lines if line["cell"]["task"] == language.name]
        if own:
            tables.append(_table(language.name, own, [method.name for method in experiment.methods]))
    return tables


def _table(name: str, lines: Lines, methods: Sequence[str]) -> TextTable:
    found = [_with_gaps(line["teacher"], line["teacher"]) for line in lines]
    metrics = [metric for metric in found[0] if metric != "score"]
    rows = [["*teacher*", *(_cell(found, metric) for metric in metrics)]]
    for method in methods:
        own = [_with_gaps(line["metrics"], line["teacher"]) for line in lines if line["cell"]["method"] == method]
        if own:
            rows.append([f"`{method}`", *(_cell(own, metric) for metric in metrics)])
    note = (
        f"{name}: mean ± standard error over seeds. A gap is the student's log-perplexity minus the teacher's; "
        "agreement the share of greedy next tokens that are the teacher's; ROUGE-L is 0 to 100."
    )
    return TextTable(["", *map(_label, metrics)], rows, note)


def _with_gaps(metrics: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """All metrics, and behind each perplexity how far its logarithm is from the teacher's."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        found[name] = value
        if name.startswith("perplexity"):
            found[name.replace("perplexity", "gap")] = math.log(value / teacher[name])
    return found


def _label(metric: str) -> str:
    kind = next(kind for kind in KINDS if metric.startswith(kind))
    return f"{KINDS[kind]} ({metric.removeprefix(kind).strip('_')})"


def _cell(found: Sequence[Mapping[str, Any]], metric: str) -> str:
    scale = 100 if metric.startswith("agreement") else 1
    made = mean(scale * float(one[metric]) for one in found)
    if made is None:
        return ""
    places = 3 if metric.startswith("gap") else 2
    error = "" if made.error is None else f" ± {made.error:.{places}f}"
    return f"{made.value:.{places}f}{error}"
