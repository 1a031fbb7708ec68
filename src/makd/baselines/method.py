"""Baselines: what each of them is: a way from teacher, budget and text to a student and the stages of its training.

A comparison then gives all of them the same trainer, data and steps, so that they differ in the method alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from makd.aspects import Plan, Term, activate
from makd.capture import examine
from makd.errors import SettingError
from makd.ranks.budget import Budget

Batches = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One of the trainings that follow each other."""

    plan: Plan
    share: float = 1.0
    """Of all steps, in (0, 1]; the shares of a method's stages add up to 1."""
    trainable: Literal["all", "linears", "adapters"] | None = None
    """Which parameters learn, as `TrainingConfig.trainable` has it; None leaves it to the comparison."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SettingError(f"A stage's share of the steps is in (0, 1]; got {self.share}.")


@dataclass(frozen=True, kw_only=True)
class PreparedStudent:
    """A student before its training, and how it is trained."""

    student: PreTrainedModel
    stages: tuple[PlannedStage, ...]
    saved: float = 0.0
    """Seconds that the student would have taken to make, had another method not begun from it, too."""

    def steps(self, total: int) -> tuple[int, ...]:
        """Steps of each stage, which add up to `total`; at least 1 each, or none at all.

        Raises:
            SettingError: there are more stages than steps.
        """
        if total == 0:
            return (0,) * len(self.stages)
        if total < len(self.stages):
            raise SettingError(f"{len(self.stages)} stages need as many steps; got {total}.")
        left, counts = total, []
        for index, stage in enumerate(self.stages):
            after = len(self.stages) - index - 1
            counts.append(left if after == 0 else min(max(1, round(stage.share * total)), left - after))
            left -= counts[-1]
        return tuple(counts)


@dataclass(frozen=True)
class Start:
    """A low-rank student before its training."""

    student: PreTrainedModel
    saved: float
    """Seconds that it would have taken to make, if it was there already; else 0."""


class MakeStart(Protocol):
    """Makes the low-rank student that a method begins from, or gives one that was made before."""

    def __call__(
        self, teacher: PreTrainedModel, budget: Budget, solver: str, ranks: str, calibration: Batches | None
    ) -> Start:
        """Arguments are those of `makd.factorize`."""


@dataclass(frozen=True)
class Span:
    """Numbers that a search may try: all between two, on a logarithmic scale or not."""

    low: float
    high: float
    is_logarithmic: bool = True

    @property
    def ends(self) -> tuple[float, float]:
        """Its numbers that are farthest apart: where both are allowed, all between them are."""
        return self.low, self.high

    def holds(self, value: float | int | str | bool | None) -> bool:
        """Whether `value` is one of them."""
        return isinstance(value, float | int) and self.low <= value <= self.high

    def at(self, place: float) -> float:
        """The number at a place in [0, 1): `low` is at 0, `high` at 1."""
        if self.is_logarithmic:
            return float(self.low * (self.high / self.low) ** place)
        return float(self.low + (self.high - self.low) * place)


@dataclass(frozen=True)
class Choice:
    """Values that a search may try."""

    values: tuple[float | int | str, ...]

    @property
    def ends(self) -> tuple[float | int | str, ...]:
        """All of them: of names none is between others."""
        return self.values

    def holds(self, value: float | int | str | bool | None) -> bool:
        """Whether `value` is one of them."""
        return value in self.values

    def at(self, place: float) -> float | int | str:
        """The value at a place in [0, 1), of which each has an equal part."""
        return self.values[int(place * len(self.values))]


SearchSpace = Mapping[str, Span | Choice]
"""Field of a baseline -> what a search may try for it."""

LEARNING_RATES = Span(3e-5, 1e-3)
"""Of every baseline: wide enough for copied weights, which want a small one, and for random ones."""


@runtime_checkable
class Baseline(Protocol):
    """A method with its hyper-parameters: a frozen dataclass, so that `dataclasses.replace` changes them."""

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of all stages."""

    @property
    def search(self) -> SearchSpace:
        """Which hyper-parameters are searched, and where."""

    def prepare(
        self,
        teacher: PreTrainedModel,
        budget: Budget,
        calibration: Batches | None = None,
        seed: int = 0,
        begin: MakeStart = ...,
    ) -> PreparedStudent:
        """Make the student, within `budget`, and say how it is trained.

        Args:
            teacher: fine-tuned, with its head; it is not changed.
            budget: what the student may have.
            calibration: batches without labels, for those solvers that look at text.
            seed: of whatever is random.
            begin: makes the low-rank student, where the method begins from one.
        """


def prepared(
    teacher: PreTrainedModel, student: PreTrainedModel, *stages: tuple[tuple[Term, ...], float]
) -> PreparedStudent:
    """A student with its stages (terms, share of the steps), which are checked against both models.

    Raises:
        SettingError: a term does not fit the models.
    """
    made = tuple(PlannedStage(plan=Plan(terms=terms), share=share) for terms, share in stages)
    for stage in made:
        activate(stage.plan, examine(student), examine(teacher))
    return PreparedStudent(student=student, stages=made)
