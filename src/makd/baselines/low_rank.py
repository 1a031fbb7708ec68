"""Baseline: low-rank factors, then plain fine-tuning on the labels.

Papers: truncated SVD; FWSVD (Hsu et al., arXiv 2207.00112) with start `fisher`; SVD-LLM (Wang et al., arXiv 2403.07378)
with start `whitened`; reduced-rank regression with start `regression`. Kept: the factors in closed form, then training
on the task alone. Different: ranks are uniform, so that all starts have the same shape; FWSVD's Fisher information is
that of the teacher's outputs and not of the labels, since calibration text need have none.
"""

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from makd.aspects import Term
from makd.baselines.method import LEARNING_RATES, Batches, MakeStart, PreparedStudent, SearchSpace
from makd.baselines.starts import low_rank_start, prepared_from
from makd.kinds import checked
from makd.ranks.budget import Budget


@dataclass(frozen=True, kw_only=True)
@checked("settings")
class LowRankFineTuning:
    """Factors of one start, and the task."""

    start: str = "svd"
    """The solver: `svd`, `fisher`, `whitened`, `regression`, or any other of `SOLVERS`."""
    learning_rate: float = 1e-4
    search: SearchSpace = field(default_factory=lambda: {"learning_rate": LEARNING_RATES}, repr=False)

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
        return prepared_from(teacher, start, ((Term(aspect="task"),), 1.0))
