"""Baseline: MaKD as in the paper.

Paper: Liu et al. (arXiv 2604.03110), figure 1c. Kept: truncated SVD of every linear at one share of its rank; matrix
distillation (queries, keys, values, up, down), layer distillation (hidden states, attention) and predictions, all at
once. Different: squared differences are in units of the teacher's variance, so that the paper's unpublished weights are
not needed; labels enter with a weight.
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
class PaperMakd:
    """Factors by truncated SVD; every aspect at every layer."""

    matrix_weight: float = 1.0
    layer_weight: float = 1.0
    """Of hidden states and attention, each."""
    task_weight: float = 1.0
    learning_rate: float = 1e-4
    search: SearchSpace = field(
        default_factory=lambda: {
            "learning_rate": LEARNING_RATES,
            "matrix_weight": Span(0.1, 10.0),
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
        start = begin(teacher, budget, "svd", "uniform", None)
        terms = (
            Term(aspect="matrix", weight=self.matrix_weight),
            Term(aspect="hidden", weight=self.layer_weight),
            Term(aspect="attention", weight=self.layer_weight),
            Term(aspect="logits"),
            Term(aspect="task", weight=self.task_weight),
        )
        return prepared_from(teacher, start, (terms, 1.0))
