"""Baseline: a low-rank student that mimics hidden states and attention, besides predictions.

Paper: figure 1b of arXiv 2604.03110 (feature-based distillation). Kept: hidden states and attention of every layer,
predictions, labels. Different: losses of hidden states are in units of the teacher's variance; ranks are uniform, from
truncated SVD.
"""

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from makd.aspects import Term
from makd.baselines.method import LEARNING_RATES, Batches, MakeStart, PreparedStudent, SearchSpace, Span
from makd.baselines.starts import low_rank_start, prepared_from
from makd.kinds import checked
from makd.ranks.budget import Budget


@dataclass(frozen=True, kw_only=True)
@checked("settings")
class LowRankFeature:
    """Factors by truncated SVD; hidden states, attention, predictions and labels."""

    start: str = "svd"
    """The solver."""
    layer_weight: float = 1.0
    """Of hidden states and attention, each."""
    task_weight: float = 1.0
    learning_rate: float = 1e-4
    search: SearchSpace = field(
        default_factory=lambda: {
            "learning_rate": LEARNING_RATES,
            "layer_weight": Span(0.1, 10.0),
            "task_weight": Span(0.1, 10.0),
        },
        repr=False,
    )

    def prepare(
        self,
        teacher: PreTrainedModel,
        budget: Budget,
        calibration: Batches | None = None,
        seed: int = 0,
        begin: MakeStart = low_rank_start,
    ) -> PreparedStudent:
        """See `Baseline`."""
        start = begin(teacher, budget, self.start, "uniform", calibration)
        terms = (
            Term(aspect="hidden", weight=self.layer_weight),
            Term(aspect="attention", weight=self.layer_weight),
            Term(aspect="logits"),
            Term(aspect="task", weight=self.task_weight),
        )
        return prepared_from(teacher, start, (terms, 1.0))
