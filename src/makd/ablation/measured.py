"""Station 10: what an ablation tells of each variation: measurements of its runs, the one that decides first."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from makd.comparison.statistics import Difference, Mean, difference, mean, pairs
from makd.measures import LABELS, PERFECT, task_label

Line = Mapping[str, Any]

_LESS_IS_BETTER = {"perplexity", *(name for name, of_a_copy in PERFECT.items() if of_a_copy == 0)}


@dataclass(frozen=True)
class Measure:
    """One measurement of a run's `metrics.json`, which has it of several moments."""

    label: str
    """For a person."""
    form: str
    """How its numbers are written."""
    part: str
    """Where it stands in the metrics."""
    key: str = ""
    """Its name there; empty if it is the whole part."""

    @property
    def towards(self) -> str:
        """Which way is better."""
        return "less" if (self.key or self.part) in _LESS_IS_BETTER else "more"

    def by_seed(self, lines: Iterable[Line], when: str) -> dict[tuple[str, int], float]:
        """Its value of each seed that has it, of one moment: `teacher`, `before` or `after`."""
        found = {}
        for line in lines:
            value = line["metrics"].get(self.part, {}).get(when)
            value = value.get(self.key) if isinstance(value, Mapping) else value
            if value is not None:
                found["", int(line["seed"])] = float(value)
        return found

    def mean(self, lines: Iterable[Line], when: str) -> Mean | None:
        """Mean and standard error over seeds."""
        return mean(self.by_seed(lines, when).values())

    def gain(self, ours: Iterable[Line], theirs: Iterable[Line]) -> Difference | None:
        """Ours minus theirs, paired over seeds."""
        return difference(pairs(self.by_seed(ours, "after"), self.by_seed(theirs, "after")))

    def text(self, found: Mean | None) -> str:
        """A mean with its standard error."""
        return mean_text(found, self.form)

    def gain_text(self, found: Difference | None) -> str:
        """In standard errors of itself, with the p of a two-sided t-test, where there are several seeds."""
        if found is None:
            return ""
        told = f"{100 * found.mean:+.1f}%" if "%" in self.form else f"{found.mean:+.4f}"
        return told if found.over_seeds is None else f"{told} = {found.over_seeds.text()}"


def mean_text(found: Mean | None, form: str) -> str:
    """A mean with its standard error; empty if there is none."""
    if found is None:
        return ""
    return form.format(found.value) + ("" if found.error is None else f" ± {form.format(found.error)}")


def measures_of(metrics: Mapping[str, Any]) -> list[Measure]:
    """What a run's metrics have; a task's score is first, then perplexity, then fidelity."""
    scores = sorted(metrics.get("task", {}).get("after", {}), key=lambda name: name != "score")
    found = [Measure(task_label(name), "{:.4f}", "task", name) for name in scores]
    if "perplexity" in metrics:
        found.append(Measure(*LABELS["perplexity"], "perplexity"))
    fidelity = metrics.get("fidelity", {}).get("after", {})
    return found + [Measure(*named, "fidelity", key) for key, named in LABELS.items() if key in fidelity]


def by_variation(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """The lines of each variation, in their order."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(str(line["variation"]), []).append(line)
    return found


def seconds_of(lines: Iterable[Line]) -> Mean | None:
    """Of training."""
    return mean(float(line["metrics"]["seconds"].get("distill", 0.0)) for line in lines)
