"""Station 9: what `metrics.json` holds that no model is run for, the same of every command that makes a student."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from makd.factorization.outcome import FactorizeReport

Lessons = Mapping[int, Mapping[str, float | int]]
"""Layer -> what teaching it did."""


def unmeasured_metrics(
    parameters: Mapping[str, Mapping[str, int]],
    stored: Mapping[str, int],
    made: FactorizeReport | None,
    lessons: Lessons,
) -> dict[str, Any]:
    """Sizes of both sides, and what was done to the student's layers.

    Args:
        parameters: `teacher` and `student` -> parameters, `total` and of the `linears`.
        stored: `teacher` and `student` -> bytes of the weights.
        made: how the run made the student; None if it began with one.
        lessons: what its layers learned one by one.
    """
    shared = () if made is None else made.shared_inputs
    return {
        "params": {key: {side: counts[key] for side, counts in parameters.items()} for key in ("total", "linears")},
        "bytes": dict(stored),
        **({"layerwise": [dict(lesson) for lesson in lessons.values()]} if lessons else {}),
        **({"shared_inputs": [{**asdict(group), "linears": [*group.linears]} for group in shared]} if shared else {}),
    }


def token_counts(
    made: FactorizeReport | None,
    lessons: Lessons,
    *,
    training: int = 0,
    written: Mapping[str, int] | None = None,
    evaluation: int = 0,
) -> dict[str, Any]:
    """Real tokens of everything that was read.

    Args:
        made: how the run made the student; None if it began with one.
        lessons: what its layers learned one by one.
        training: tokens that training saw.
        written: `student`, `teacher` -> tokens of the completions that each wrote during it.
        evaluation: tokens of the held-out text; 0 where nothing was measured.
    """
    return {
        **({"calibration": made.tokens} if made is not None and made.tokens else {}),
        "training": training,
        **({"written": dict(written)} if written else {}),
        **({"layerwise": sum(int(one["tokens"]) for one in lessons.values())} if lessons else {}),
        "evaluation": evaluation,
    }
