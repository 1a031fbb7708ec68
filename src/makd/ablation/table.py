"""Station 10: the lines of an ablation as a table: what each variation measures, and how it differs."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from makd.ablation.variations import WHOLE
from makd.comparison.statistics import Mean, difference, mean, pairs
from makd.measures import LABELS, task_label
from makd.report.text_table import markdown_table, plain_table

Line = Mapping[str, Any]

_LESS_IS_BETTER = ("perplexity", "prediction_kl", "squared_difference")
START = "start, untaught"


def ablation_table(lines: Sequence[Line], title: str) -> Table:
    """For the terminal."""
    return plain_table(title, *_table(lines), left=1)


def ablation_markdown(lines: Sequence[Line]) -> str:
    """For a page."""
    head, rows = _table(lines)
    return markdown_table(head, rows)


def _table(lines: Sequence[Line]) -> tuple[list[str], list[tuple[str, ...]]]:
    measures = _measures(lines[0]["metrics"])
    first = next(iter(measures))
    rows = [("teacher", *_told(lines, measures, "teacher"), "", ""), (START, *_told(lines, measures, "before"), "", "")]
    whole = _by_seed([line for line in lines if line["variation"] == WHOLE], measures[first], "after")
    for name in dict.fromkeys(str(line["variation"]) for line in lines):
        own = [line for line in lines if line["variation"] == name]
        less = "" if name == WHOLE else _difference(_by_seed(own, measures[first], "after"), whole, _form(first))
        seconds = mean(line["metrics"]["seconds"].get("distill", 0.0) for line in own)
        rows.append((name, *_told(own, measures, "after"), _text(seconds, "{:.0f}"), less))
    towards = "less" if _key(first) in _LESS_IS_BETTER else "more"
    names = [*measures, "seconds", f"{first} minus that of the {WHOLE}, {towards} is better"]
    return ["", *names], rows


def _measures(metrics: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What is told of each variation, what decides first: its name for a person -> part of the metrics, and key."""
    found = {task_label(key): ("task", key) for key in sorted(metrics.get("task", {}).get("after", {}), key=_rank)}
    if "perplexity" in metrics:
        found[LABELS["perplexity"][0]] = ("perplexity", "")
    fidelity = metrics.get("fidelity", {}).get("after", {})
    return found | {label: ("fidelity", key) for key, (label, _) in LABELS.items() if key in fidelity}


def _rank(metric: str) -> int:
    """A task's score before its metrics."""
    return 0 if metric == "score" else 1


def _key(label: str) -> str:
    return next((key for key, (name, _) in LABELS.items() if name == label), "")


def _form(label: str) -> str:
    return next((form for name, form in LABELS.values() if name == label), "{:.4f}")


def _by_seed(lines: Sequence[Line], measure: tuple[str, str], when: str) -> dict[tuple[str, int], float]:
    """A measurement of each seed that has it."""
    part, key = measure
    found = {}
    for line in lines:
        value = line["metrics"].get(part, {}).get(when)
        value = value.get(key) if isinstance(value, Mapping) else value
        if value is not None:
            found["", int(line["seed"])] = float(value)
    return found


def _told(lines: Sequence[Line], measures: Mapping[str, tuple[str, str]], when: str) -> tuple[str, ...]:
    return tuple(
        _text(mean(_by_seed(lines, measure, when).values()), _form(label)) for label, measure in measures.items()
    )


def _text(found: Mean | None, form: str) -> str:
    """Mean and standard error over seeds."""
    if found is None:
        return ""
    return form.format(found.value) + ("" if found.error is None else f" ± {form.format(found.error)}")


def _difference(ours: Mapping[tuple[str, int], float], theirs: Mapping[tuple[str, int], float], form: str) -> str:
    """Paired over seeds; in standard errors of itself, with the p of a two-sided t-test, where there are several."""
    found = difference(pairs(ours, theirs))
    if found is None:
        return ""
    told = f"{found.mean:+.4f}" if "%" not in form else f"{100 * found.mean:+.1f}%"
    if found.overall is None:
        return told
    return f"{told} = {found.overall.count:+.1f} SE (p {found.overall.probability:.2g})"
