"""Baseline: patient knowledge distillation.

Paper: Sun et al. (arXiv 1908.09355), PKD-Skip. Kept: the student begins with the teacher's first layers; the normalised
states of the first token ([CLS]) of every layer but the last mimic the teacher's at evenly spread layers; (1 - alpha)
hard loss + alpha soft loss at a temperature. Different: the patient loss is 1 - cosine, half of the paper's squared
distance of unit vectors, and a mean over the layers where the paper has a sum, which its searched weight takes up.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedModel

from makd.aspects import Term
from makd.baselines.method import (
    LEARNING_RATES,
    Batches,
    Choice,
    MakeStart,
    PreparedStudent,
    SearchSpace,
    Span,
    prepared,
)
from makd.baselines.shallow import fewer_layers
from makd.kinds import checked
from makd.ranks.budget import Budget


@dataclass(frozen=True, kw_only=True)
@checked("settings")
class PatientDistillation:
    """The first layers; predictions, labels, and the first token's states of all layers but the last."""

    start: Literal["first", "spread"] = "first"
    """Which of the teacher's layers are copied."""
    temperature: float = 5.0
    soft_share: float = 0.5
    """Share of the soft loss beside the hard one, in (0, 1)."""
    patient_weight: float = 1.0
    learning_rate: float = 1e-4
    search: SearchSpace = field(
        default_factory=lambda: {
            "learning_rate": LEARNING_RATES,
            "temperature": Choice((5.0, 10.0, 20.0)),
            "soft_share": Choice((0.2, 0.5, 0.7)),
            "patient_weight": Span(0.03, 10.0),
        },
        repr=False,
    )

    def prepare(
        self,
        teacher: PreTrainedModel,
        budget: Budget,
        calibration: Batches | None = None,
        seed: int = 0,
        begin: MakeStart | None = None,
    ) -> PreparedStudent:
        """See `Baseline`."""
        student = fewer_layers(teacher, budget, self.start)
        depth = student.config.num_hidden_layers
        # of one layer, all but the last would be none
        watched: str | list[int] = list(range(depth - 1)) or "last"
        terms = (
            Term(aspect="task", weight=1 - self.soft_share),
            Term(aspect="logits", weight=self.soft_share, temperature=self.temperature),
            Term(aspect="hidden", weight=self.patient_weight, layers=watched, distance="cosine", tokens="first"),
        )
        return prepared(teacher, student, (terms, 1.0))
