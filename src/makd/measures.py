"""What measurements are called for a person, and a run's `metrics.json` as rows of texts. Needs no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

LABELS = {
    "rank_correlation": ("rank correlation", "{:.4f}"),
    "cosine": ("cosine to teacher", "{:.4f}"),
    "prediction_kl": ("prediction KL (nats)", "{:.4f}"),
    "top1_agreement": ("top-1 agreement", "{:.1%}"),
    "label_agreement": ("labels alike", "{:.1%}"),
    "label_set_agreement": ("sets of labels alike", "{:.1%}"),
    "squared_difference": ("squared difference", "{:.4g}"),
    "perplexity": ("perplexity", "{:.2f}"),
}
"""Measurement -> its name for a person, and its format."""

PERFECT = {
    "rank_correlation": 1.0,
    "cosine": 1.0,
    "prediction_kl": 0.0,
    "top1_agreement": 1.0,
    "label_agreement": 1.0,
    "label_set_agreement": 1.0,
    "squared_difference": 0.0,
}
"""Measurement of a student beside its teacher -> what a copy would have."""

LESS_IS_BETTER = {"perplexity", *(name for name, of_a_copy in PERFECT.items() if of_a_copy == 0)}
"""Of the others more is."""

DECIDING = ("rank_correlation", "cosine", "top1_agreement", "label_agreement", "squared_difference")
"""Measurements of a student beside its teacher: the first that was made says how good the student is, where there is
no task and no perplexity."""

WORSE = 0.05
"""Share by which a training has to widen a gap to the teacher before it is called worse."""

ROLLING_LABELS = {
    "token": ("rolling perplexity", "{:.2f}"),
    "word": ("rolling perplexity, word", "{:.2f}"),
    "bits_per_byte": ("rolling bits a byte", "{:.4f}"),
}
"""The same for the perplexity of one long text. A student is some hundredths of a bit from its teacher."""

TASK_LABELS = {
    "score": "score",
    "accuracy": "accuracy",
    "f1": "F1",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "subset_accuracy": "subset accuracy",
    "r2": "R²",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "entity_f1": "entity F1",
    "entity_precision": "entity precision",
    "entity_recall": "entity recall",
    "token_accuracy": "token accuracy",
    "exact_match": "exact match",
    "answerable_f1": "F1, answerable",
    "unanswerable_f1": "F1, unanswerable",
}
"""Metric of a task -> its name for a person. A suffix names the split, as in `accuracy_matched`."""


def compares_pair(metrics: Mapping[str, Any]) -> bool:
    """Whether they are of a student beside its teacher: those of `makd finetune` are of one model alone."""
    counts = metrics.get("params")
    return isinstance(counts, dict) and all(isinstance(one, dict) and "student" in one for one in counts.values())


def table_of(metrics: Mapping[str, Any], head: Sequence[str]) -> tuple[list[str], list[tuple[str, ...]]]:
    """`head` and `rows`, without the column from before the training where there was none and it says the same."""
    found = rows(metrics)
    same = not metrics["tokens"]["training"] and all(before in ("", after) for _, _, before, after in found)
    kept = [0, 1, 3] if same else [0, 1, 2, 3]
    return [head[at] for at in kept], [tuple(row[at] for at in kept) for row in found]


def rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, teacher, before training, student) of a run's `metrics.json`, as texts; empty where none applies."""
    table = []
    for key, label in (("total", "parameters"), ("linears", "  of the linears")):
        counts = metrics["params"][key]
        share = counts["student"] / counts["teacher"]
        table.append((label, f"{counts['teacher']:,}", "", f"{counts['student']:,} ({share:.1%})"))
    if "bytes" in metrics:
        stored = metrics["bytes"]
        table.append(("bytes on disk", f"{stored['teacher']:,}", "", f"{stored['student']:,}"))
    for batch in ("batch1", "batch16"):
        if "latency_ms" in metrics:
            theirs, ours = (metrics["latency_ms"][side][batch] for side in ("teacher", "student"))
            label = f"ms a forward, {batch.replace('batch', 'batch ')}"
            table.append((label, f"{theirs:.1f}", "", f"{ours:.1f} ({ours / theirs:.2f}x)"))
    table += _language_rows(metrics)
    task = metrics.get("task", {})
    for name, value in task.get("after", {}).items():
        before = f"{task['before'][name]:.4f}" if "before" in task else ""
        table.append((f"{task['name']} {task_label(name)}", f"{task['teacher'][name]:.4f}", before, f"{value:.4f}"))
    fidelity = metrics.get("fidelity", {})  # a student that was never in memory was not compared
    before, after = fidelity.get("before", {}), fidelity.get("after", {})
    for name, value in after.items():
        label, form = LABELS[name]
        table.append((label, "", form.format(before[name]) if name in before else "", form.format(value)))
    return table


def _language_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows as `rows` gives them, of causal language models alone: perplexities, and answers to instructions."""
    table = []
    rolling = metrics.get("rolling_perplexity", {})
    measured = [(LABELS["perplexity"], metrics.get("perplexity", {}))]
    measured += [(told, {when: rolling[when][name] for when in rolling}) for name, told in ROLLING_LABELS.items()]
    for (label, form), values in measured:
        if values:
            before = form.format(values["before"]) if "before" in values else ""
            table.append((label, form.format(values["teacher"]), before, form.format(values["after"])))
    answers = metrics.get("instructions")
    if answers is not None:
        theirs, ours = (_spread(answers["rouge_l"][side]) for side in ("teacher", "student"))
        table.append(
            (f"ROUGE-L, {len(answers['seeds'])} {'seed' if len(answers['seeds']) == 1 else 'seeds'}", theirs, "", ours)
        )
        theirs, ours = (f"{answers['answer_tokens'][side]:.0f}" for side in ("teacher", "student"))
        table.append(("tokens of an answer", theirs, "", ours))
    return table


def _spread(found: Mapping[str, Any]) -> str:
    """Mean and standard deviation over seeds."""
    deviation = found["deviation"]
    return f"{found['mean']:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def task_score(after: Mapping[str, float]) -> str:
    """Which of a task's metrics says how good a model is."""
    return "score" if "score" in after else next(iter(after))


def deciding(fidelity: Mapping[str, float]) -> str | None:
    """Which of `DECIDING` was measured; None if none was."""
    return next((name for name in DECIDING if name in fidelity), None)


def worsened(metrics: Mapping[str, Any]) -> list[str]:
    """What a training left worse than its start had it, in words; nothing unless all that was measured is.

    Of a task that is its score; of a language model the perplexity, of all the distance to the teacher, where the
    training has widened it by more than `WORSE`, and so that it shows.
    """
    found: list[tuple[bool, str]] = []
    task, perplexity, fidelity = (metrics.get(name, {}) for name in ("task", "perplexity", "fidelity"))
    if "before" in task:
        name = task_score(task["after"])
        before, after = task["before"][name], task["after"][name]
        found.append((after < before, f"{task_label(name)} {before:.4f} before, {after:.4f} after"))
    if "before" in perplexity:
        theirs, before, after = (math.log(perplexity[side]) for side in ("teacher", "before", "after"))
        worse = after - theirs > (1 + WORSE) * max(before - theirs, 0.0)
        found.append((worse, f"perplexity {perplexity['before']:.2f} before, {perplexity['after']:.2f} after"))
    for name, after in fidelity.get("after", {}).items():
        if name in PERFECT and name in fidelity.get("before", {}):
            before, (label, form) = fidelity["before"][name], LABELS[name]
            worse = abs(after - PERFECT[name]) > (1 + WORSE) * abs(before - PERFECT[name])
            seen = form.format(before) != form.format(after)  # a start may be as good as a copy
            found.append((worse and seen, f"{label} {form.format(before)} before, {form.format(after)} after"))
    return [told for _, told in found] if all(worse for worse, _ in found) else []


def known_metric(name: str) -> str:
    """The metric of `TASK_LABELS` that `name` is, perhaps of one of several splits; empty if it is none."""
    known = sorted(TASK_LABELS, key=len, reverse=True)
    return next((key for key in known if f"{name}_".startswith(f"{key}_")), "")


def task_label(name: str) -> str:
    """A task's metric for a person, perhaps of one of several splits."""
    known = known_metric(name)
    rest = name.removeprefix(known).strip("_")
    return TASK_LABELS.get(known, "") + (f" ({rest})" if rest and known else rest)
