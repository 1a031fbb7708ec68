"""Station 8: whether a student is worth it where its teacher could be rounded instead, in a sentence for each batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from makd.evaluation.formats import FormatRow, FormatTiming
from makd.evaluation.speed import FLOAT
from makd.measures import deciding

SAME_QUALITY = 0.005
"""Scores that are no further apart count as equal: half a point."""
SAME_COST = 0.02
"""The same of milliseconds and bytes, as a share."""
DIFFERENCE = "squared_difference"
"""Of models that predict numbers: in the square of their unit, so no difference of it is small for all of them."""
NO_VERDICT = (
    "Whether the student or the rounded teacher is the better deal is not said: a squared difference is in the square "
    "of the outputs' unit, and how much of it counts is for you to judge. A task's score has no unit (--task)."
)


@dataclass(frozen=True)
class QualityScore:
    """How good a model is."""

    name: str
    """Of what was measured."""
    value: float
    """As it was measured. Larger is better, but of a `DIFFERENCE`."""


def quality(scores: Mapping[str, Any]) -> QualityScore:
    """The one figure that says how good a model is: a task's score; else how far it agrees with the teacher."""
    if "task" in scores:
        return QualityScore("score", float(scores["task"]["score"]))
    found = scores["fidelity"]
    name = deciding(found)
    assert name is not None  # `fidelity` has one of them for every kind of head
    return QualityScore(name, float(found[name]))


def verdicts(rows: Sequence[FormatRow]) -> tuple[str, ...]:
    """For each batch and length: the student against the teacher alone, each in its best format.

    The student's best is the fastest that loses no quality to its own float32; the teacher's the fastest that is as
    good as that one. A `DIFFERENCE` alone decides nothing, which is said.
    """
    if quality(rows[0].scores).name == DIFFERENCE:
        return (NO_VERDICT,)
    return tuple(_verdict(rows, place) for place in range(len(rows[0].timings)))


def _verdict(rows: Sequence[FormatRow], place: int) -> str:
    ours, theirs = ([row for row in rows if row.model == who] for who in ("student", "teacher"))
    student = _fastest(ours, place, next(row for row in ours if row.format == FLOAT))
    teacher = _fastest(theirs, place, student)
    mine, other = student.timings[place], teacher.timings[place]
    time = mine.timing.ratio / other.timing.ratio
    size = student.bytes / teacher.bytes
    found = quality(student.scores)
    better = found.value - quality(teacher.scores).value
    costs = {"latency": time, "bytes": size}
    wins = [what for what, share in costs.items() if share < 1 - SAME_COST]
    losses = [what for what, share in costs.items() if share > 1 + SAME_COST]
    (losses if better < -SAME_QUALITY else wins if better > SAME_QUALITY else []).append(found.name)
    if not wins:
        said = "The teacher alone is the better deal"
    elif losses:
        said = f"The student is better in {_list(wins)}, the teacher alone in {_list(losses)}"
    else:
        said = "The student is the better deal"
    return (
        f"{mine.batch} x {mine.length}: {said}: {student.format} student {_told(student, mine)}, "
        f"{teacher.format} teacher {_told(teacher, other)}: {time:.2f}x the latency, {size:.2f}x the bytes."
    )


def _fastest(rows: Sequence[FormatRow], place: int, than: FormatRow) -> FormatRow:
    """The fastest of those that are as good as `than`; the best one if none is."""
    enough = quality(than.scores).value - SAME_QUALITY
    good = [row for row in rows if quality(row.scores).value >= enough]
    if not good:
        return max(rows, key=lambda row: quality(row.scores).value)
    return min(good, key=lambda row: row.timings[place].timing.ratio)


def _told(row: FormatRow, timing: FormatTiming) -> str:
    found = quality(row.scores)
    return f"{timing.timing.milliseconds:.1f} ms, {row.bytes / 1e6:.1f} MB, {found.name} {found.value:.4g}"


def _list(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
