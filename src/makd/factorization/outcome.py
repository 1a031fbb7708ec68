"""Station 3: what a factorization did, for the log and for whoever holds the student."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from transformers import PreTrainedModel

from makd.factorization.outline import Outline
from makd.ranks.allocation import RankPlan
from makd.ranks.curves import ErrorCurve
from makd.ranks.sharing import SharedInput
from makd.solvers.whitened import ALL_ZERO
from makd.student.counting import count_parameters

logger = logging.getLogger(__name__)

WHOLE = Outline()
"""All layers, and an untouched vocabulary."""
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class FactorizeReport:
    """What factorization did to each linear."""

    ranks: Mapping[str, int]
    """Factored linear -> rank."""
    dense: Mapping[str, str]
    """Linear left as it was -> why."""
    errors: Mapping[str, float]
    """Factored linear -> predicted error relative to dropping the linear, in the solver's own norm, in [0, 1]."""
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    """Factored linear -> what was done because its statistics were not positive definite."""
    parameters: Mapping[str, int] = field(default_factory=dict)
    """Of the whole student, shared ones once: `total`, `factored`, `vocabulary`."""
    vocabulary: Mapping[str, int] = field(default_factory=dict)
    """Factored embeddings or LM head -> rank; a head that is tied to the embeddings has theirs. Of embeddings in bands,
    each band: `name[begin:end]`, its tokens' places in order of frequency. They are in `errors`, `fallbacks` and, where
    they stay as they are though factors would have helped, in `dense` too."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Layer that the student does without -> what its absence was measured to do."""
    trials: Mapping[int, float] = field(default_factory=dict)
    """Where several depths were tried: layers -> how far the student's outputs were from the teacher's on calibration
    text, in nats a prediction or as squared distance of unit embeddings. The nearest was taken."""
    shared_inputs: tuple[SharedInput, ...] = ()
    """Every group of linears that read the same input: whether they got one A, and what that was decided by."""
    spectra: tuple[ErrorCurve, ...] = ()
    """What the ranks were chosen from; empty where no spectra were looked at."""
    lessons: Mapping[int, Mapping[str, float | int]] = field(default_factory=dict)
    """Layer -> what teaching it did, where layers were taught: see `makd.distill.LayerTrainingResult`."""
    tokens: int = 0
    """Real ones of the text that the solver read; 0 where it reads none."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What `calibrate` (statistics) and `factorize` (layers to drop, decompositions, ranks, factors) took, for every
    student that was tried."""


def make_report(
    student: PreTrainedModel,
    plan: RankPlan,
    errors: Mapping[str, float],
    fallbacks: Mapping[str, str],
    outline: Outline = WHOLE,
    left: Mapping[str, str] = NOTHING,
    shared_inputs: tuple[SharedInput, ...] = (),
) -> FactorizeReport:
    """What was done to each linear."""
    _warn(fallbacks, len(errors))
    vocabulary = {name for table in outline.tables for name in table.parts}
    factored = {name: rank for name, rank in plan.ranks.items() if rank is not None}
    return FactorizeReport(
        ranks={name: rank for name, rank in factored.items() if name not in vocabulary},
        vocabulary={name: rank for name, rank in factored.items() if name in vocabulary},
        dropped={
            drop.layer: f"number {number} to go: the outputs were then {drop.drift:.3g} from the teacher's"
            for number, drop in enumerate(outline.drops, start=1)
        },
        dense={
            **{
                name: "its rank reached break-even, where factors save nothing"
                for name, rank in plan.ranks.items()
                if rank is None
            },
            **left,
        },
        errors=errors,
        fallbacks=fallbacks,
        parameters=count_parameters(student),
        shared_inputs=shared_inputs,
    )


def _warn(fallbacks: Mapping[str, str], fitted: int) -> None:
    """Of linears about which the text said nothing at all; the report has the other fallbacks, which are no fault."""
    names = [name for name, fallback in fallbacks.items() if ALL_ZERO in fallback]
    if names:
        others = f" and {len(names) - 1} more of {fitted} linears" if len(names) > 1 else ""
        logger.warning(
            "%s%s: the calibration text has nothing but zeros there, so that their factors know the weights alone. "
            "Give text that reaches them, or more (calibration.rows)",
            names[0],
            others,
        )


def warn_of_little_text(tokens: int, features: Mapping[str, int]) -> None:
    """Say so where the text has fewer tokens than linears have inputs, before anything is made of it.

    Args:
        tokens: real ones.
        features: linear -> how many it reads.
    """
    short = [name for name, count in features.items() if count > tokens]
    if short:
        others = f" and {len(short) - 1} more linears" if len(short) > 1 else ""
        logger.warning(
            "The calibration text has %s tokens, fewer than the %s features that %s%s read: the rest is guessed. Give "
            "more text (calibration.rows): ten times as many tokens as features are a beginning",
            f"{tokens:,}",
            f"{max(features.values()):,}",
            max(features, key=lambda name: features[name]),
            others,
        )
