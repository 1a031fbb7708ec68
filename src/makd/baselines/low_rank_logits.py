"""Baseline: a low-rank student that mimics predictions only.

Paper: Hinton, Vinyals & Dean (arXiv 1503.02531), as in figure 1a of arXiv 2604.03110. Kept: KL of predictions with a
temperature, and the labels. Different: the paper does not say its ranks; here they are uniform, from truncated SVD.
"""

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from makd.aspects import Term
from makd.baselines.method import LEARNING_RATES, Batches, Choice, MakeStart, PreparedStudent, SearchSpace, Span
from makd.baselines.starts import low_rank_start, prepared_from
from makd.kinds import checked
from makd.ranks.budget import Budget


@dataclass(frozen=True, kw_only=True)
@checked("settings")
class LowRankLogits:
    """Factors by truncated SVD; predictions and labels."""

    start: str = "svd"
    """The solver."""
    temperature: float = 2.0
    task_weight: float = 1.0
    learning_rate: float = 1e-4
    search: SearchSpace = field(
        default_factory=lambda: {
            "learning_rate": LEARNING_RATES,
            "temperature": Choice((1.0, 2.0, 4.0, 8.0)),
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
            Term(aspect="logits", temperature=self.temperature),
            Term(aspect="task", weight=self.task_weight),
        )
        return prepared_from(teacher, start, (terms, 1.0))
