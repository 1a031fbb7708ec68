"""A run at a glance: how much smaller, how much faster, how much worse, and where it is worst."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from makd.measures import LABELS, LESS_IS_BETTER, PERFECT, deciding, task_label, task_score
from makd.report.elements import Markup, element, section
from makd.report.record import Record
from makd.report.words import Number, count, score, share, times
from makd.run_files import LAYERS, LINEARS

ROLES = {
    "q": "queries",
    "k": "keys",
    "v": "values",
    "o": "attention output",
    "gate": "feed-forward gate",
    "up": "feed-forward up",
    "down": "feed-forward down",
    "cross_q": "cross-attention queries",
    "cross_k": "cross-attention keys",
    "cross_v": "cross-attention values",
    "cross_o": "cross-attention output",
    "q_latent": "latent queries",
    "kv_latent": "latent keys and values",
}
"""A role -> what it does, for a person."""


@dataclass(frozen=True)
class Quality:
    """The one number that says best how good a student is."""

    label: str
    student: Number
    teacher: Number | None
    """None where the measure is of the student beside its teacher."""
    before: Number | None
    best: Number
    """What a perfect copy would have."""
    higher_is_better: bool = True
    rows: str = "held_out"
    """Which rows it was measured on, as `measured_on` in metrics.json calls them."""

    @property
    def answer(self) -> str:
        """How much worse, in one glance."""
        if self.teacher is None:
            return f"{score(self.student)} of {self.best:g}" if self.best else f"{score(self.student)} off"
        if self.teacher <= 0:  # a correlation, or R²: nothing has a share of it
            return score(self.student)
        ratio = self.student / self.teacher
        if self.higher_is_better:
            return f"{share(ratio)} of the teacher's"
        return f"{share(abs(ratio - 1))} {'worse' if ratio > 1 else 'better'}"

    @property
    def explanation(self) -> str:
        """What that is."""
        if self.teacher is None:
            return f"{self.label}; a perfect copy has {self.best:g}"
        return f"{self.label} {score(self.student)}, the teacher has {score(self.teacher)}"

    @property
    def trained(self) -> str:
        """What the training did to it, as a sentence without a full stop; empty where nobody measured before it."""
        if self.before is None:
            return ""
        sign = 1 if self.higher_is_better else -1
        gain, gap = sign * (self.student - self.before), sign * (self._goal - self.before)
        if gain <= 0:
            return "Training made it worse" if gain < 0 else "Training did not help"
        if gap < 1e-6:
            return "Training made it better, and it had no gap to close"
        return f"Training closed {share(gain / gap)} of the gap" if gain <= gap else "Training more than closed the gap"

    @property
    def _goal(self) -> Number:
        """What it would have without a gap."""
        return self.best if self.teacher is None else self.teacher


def quality_of(metrics: Mapping[str, Any]) -> Quality | None:
    """The first that there is of: the task's score, perplexity, and how close predictions or embeddings are."""
    task = metrics.get("task", {})
    if "teacher" in task:
        name = task_score(task["after"])
        before = task.get("before", {}).get(name)
        label, scores = f"{task['name']} {task_label(name)}", (task["after"][name], task["teacher"][name], before)
        return Quality(label, *scores, best=1.0, rows="task")
    found = metrics.get("perplexity")
    if found:
        return Quality("perplexity", found["after"], found["teacher"], found.get("before"), 1.0, False)
    fidelity = metrics.get("fidelity", {})
    best = deciding(fidelity.get("after", {}))
    if best is None:
        return None
    before, more = fidelity.get("before", {}).get(best), best not in LESS_IS_BETTER
    return Quality(LABELS[best][0], fidelity["after"][best], None, before, PERFECT[best], more)


def role_name(roles: list[str]) -> str:
    """Roles of a linear, for a person."""
    return " + ".join(ROLES.get(role, role) for role in roles)


def measured(row: Mapping[str, Any]) -> Number | None:
    """The newest measured error of a linear."""
    found = row["measured_error"]
    value: Number | None = found.get("after", found.get("before"))
    return value


def worst_linear(record: Record) -> Mapping[str, Any] | None:
    """The linear whose output is farthest from the teacher's; None where nothing was measured."""
    rows = [row for row in record.of(LINEARS).get("linears", []) if measured(row) is not None]
    return max(rows, key=lambda row: measured(row) or 0.0) if rows else None


def worst_layer(record: Record) -> Mapping[str, Any] | None:
    """The layer whose hidden states are farthest from the teacher's."""
    layers = record.of(LAYERS).get("after", {}).get("layers", [])
    known = [layer for layer in layers if "hidden_error" in layer]
    return max(known, key=lambda layer: float(layer["hidden_error"])) if known else None


def latency_ratios(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Batch -> the student's time for a forward, in the teacher's."""
    found = metrics.get("latency_ms")
    if not found:
        return {}
    return {batch: found["student"][batch] / found["teacher"][batch] for batch in found["student"]}


def glance(record: Record, advice: Markup) -> Markup:
    """The section that a person reads first."""
    tiles = [_smaller(record), _faster(record), _worse(record), _where(record)]
    return section(record.key("glance"), "At a glance", element("div", tiles, class_="tiles"), advice)


def _smaller(record: Record) -> Markup:
    total, linears = record.metrics["params"]["total"], record.metrics["params"]["linears"]
    told = f"{count(total['student'])} of {count(total['teacher'])} parameters; of the linears' " + (
        f"{share(linears['student'] / linears['teacher'])} are left"
    )
    return _tile("How much smaller", f"{share(1 - total['student'] / total['teacher'])} smaller", told)


def _faster(record: Record) -> Markup:
    ratios = latency_ratios(record.metrics)
    if not ratios:
        return _tile("How much faster", "not timed", "`makd bench` times it beside its teacher")
    best = min(ratios, key=ratios.__getitem__)
    told = "; ".join(f"batch {name.removeprefix('batch')}: {times(value)}" for name, value in ratios.items())
    return _tile("How much faster", f"{1 / ratios[best]:.2f}x as fast" if ratios[best] < 0.97 else "no faster", told)


def _worse(record: Record) -> Markup:
    quality = quality_of(record.metrics)
    if quality is None:
        return _tile("How much worse", "not measured", "`makd evaluate` compares it with its teacher")
    trained = quality.trained if record.is_trained else ""
    return _tile("How much worse", quality.answer, ". ".join(filter(None, (quality.explanation, trained))))


def _where(record: Record) -> Markup:
    worst, layer = worst_linear(record), worst_layer(record)
    if worst is None:
        return _tile("Where it is worst", "not measured", "the teacher was not at hand, or the run is older")
    told = f"{role_name(worst['roles'])}: the error is {share(measured(worst) or 0.0)} of the output's variance"
    if layer is not None:
        told += f"; of the hidden states at most {share(layer['hidden_error'])}, after layer {layer['layer']}"
    return _tile("Where it is worst", f"layer {worst['layer']}, {', '.join(worst['roles'])}", told)


def _tile(question: str, answer: str, told: str) -> Markup:
    return element(
        "div", element("h3", question), element("p", answer, class_="answer"), element("p", told), class_="tile"
    )
