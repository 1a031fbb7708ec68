"""Baseline: low-rank factors, then one of the objectives of causal language models.

Papers: supervised fine-tuning; Hinton et al. (arXiv 1503.02531); Kim & Rush (arXiv 1606.07947); MiniLLM (arXiv
2306.08543); GKD (arXiv 2306.13649); LoRA recovery as low-rank tools do it (SVD-LLM, arXiv
2403.07378, section 3.3). Kept: the loss and whose text it is of, as the presets of those names have them. Different:
all begin from the same factors, makd's, so that they differ in the objective alone.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedModel

from makd.aspects import PRESETS, Plan
from makd.baselines.method import LEARNING_RATES, Batches, MakeStart, PreparedStudent, SearchSpace
from makd.baselines.starts import low_rank_start, prepared_by
from makd.kinds import checked
from makd.ranks.budget import Budget


@dataclass(frozen=True, kw_only=True)
@checked("settings")
class LowRankObjective:
    """Factors, and a preset."""

    objective: str = "sft"
    """The preset: `sft`, `kd`, `seq_kd`, `minillm`, `gkd`, or any other of `PRESETS`; in a comparison none that follows
    the loss on held-out rows, as `distillm` does."""
    start: str = "auto"
    """The solver."""
    trainable: Literal["all", "linears", "adapters"] | None = None
    """Which parameters learn; `adapters` is LoRA recovery. None leaves it to the comparison."""
    learning_rate: float = 3e-5
    search: SearchSpace = field(default_factory=lambda: {"learning_rate": LEARNING_RATES}, repr=False)

    def __post_init__(self) -> None:
        PRESETS[self.objective]

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
        return prepared_by(teacher, start, Plan(preset=self.objective), self.trainable)
