"""The method of this package at its best: what the baselines are compared with.

The solver and ranks that `makd compress` takes by default, and the preset `balanced`: every layer's hidden states, each
second layer's matrices and attention, predictions and labels. What else is tried is in the search space.
"""

from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from makd.aspects import PRESETS, Plan, Term
from makd.baselines.method import LEARNING_RATES, Batches, Choice, MakeStart, PreparedStudent, SearchSpace, Span
from makd.baselines.starts import low_rank_start, prepared_by
from makd.errors import SettingError
from makd.kinds import checked
from makd.ranks.budget import Budget
from makd.registry import unknown_name

IN_LAYERS = ("matrix", "hidden", "attention")
"""Aspects that `layer_weight` is a factor of."""


@dataclass(frozen=True, kw_only=True)
@checked("settings")
class BestMakd:
    """Factors by the default solver, and a preset with one weight for all that is inside the layers."""

    start: str = "auto"
    """The solver."""
    preset: str = "balanced"
    """One of `PRESETS`."""
    layer_weight: float = 1.0
    """Factor of matrices, hidden states and attention."""
    task_weight: float = 1.0
    without: str | None = None
    """An aspect of the preset that is left out, for ablations."""
    layers: str | None = None
    """Layers of those terms that the preset has at some only, as in `Term.layers`; None is the preset's choice."""
    learning_rate: float = 1e-4
    search: SearchSpace = field(
        default_factory=lambda: {
            "learning_rate": LEARNING_RATES,
            "preset": Choice(("full", "balanced", "fast")),
            "layer_weight": Span(0.1, 10.0),
            "task_weight": Span(0.1, 10.0),
        },
        repr=False,
    )

    def __post_init__(self) -> None:
        aspects = tuple(dict.fromkeys(term.aspect for term in PRESETS[self.preset].terms))
        if self.without is not None and self.without not in aspects:
            raise unknown_name(f"aspect of the preset {self.preset}", self.without, aspects)
        if self.layers is not None and all(term.layers == "all" for term in PRESETS[self.preset].terms):
            raise SettingError(
                f"layers is for presets with terms at some layers only, balanced and fast; got {self.layers!r} "
                f"with {self.preset}."
            )
        for name, own in (("layer_weight", IN_LAYERS), ("task_weight", ("task",))):
            if getattr(self, name) != 1.0 and not set(own) & {*aspects}:
                raise SettingError(
                    f"{name} is {getattr(self, name)}, and the preset {self.preset} has no {' or '.join(own)}. "
                    "Leave it out."
                )
        _ = self.terms  # raises what is wrong with layers and weights before there is a teacher

    def prepare(
        self,
        teacher: PreTrainedModel,
        budget: Budget,
        calibration: Batches | None = None,
        seed: int = 0,
        begin: MakeStart = low_rank_start,
    ) -> PreparedStudent:
        """See `Baseline`."""
        start = begin(teacher, budget, self.start, "auto", calibration)
        # with whose text the preset is of: the data's, the teacher's or the student's
        plan = Plan(preset=self.preset, terms=self.terms, completions=PRESETS[self.preset].completions)
        return prepared_by(teacher, start, plan)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The preset's, as the settings have them."""
        factors = dict.fromkeys(IN_LAYERS, self.layer_weight)
        factors |= {"task": self.task_weight}
        return tuple(
            replace(
                term,
                weight=term.weight * factors.get(term.aspect, 1.0),
                layers=term.layers if self.layers is None or term.layers == "all" else self.layers,
            )
            for term in PRESETS[self.preset].terms
            if term.aspect not in ("embedding", self.without)  # the teachers have heads
        )
