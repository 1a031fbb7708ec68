"""Baseline: DistilBERT's student and losses.

Paper: Sanh et al. (arXiv 1910.01108). Kept: every other layer of the teacher, copied; soft predictions, cosine of the
last hidden states, hard loss, with the weights 5 : 1 : 2 and temperature 2 of its code. Different: it is done on the
task and its labels, not on masked language modelling; token-type embeddings and pooler stay, where the teacher has
them; which layers are copied follows `spread_layers` (of 12: 1, 3, 5, …, counted from 0; the paper's code has 0, 2, 4,
7, 9, 11).
"""

from dataclasses import dataclass, field

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
class DistilBert:
    """Every other layer; predictions, cosine of the last states, labels."""

    temperature: float = 2.0
    logits_weight: float = 5.0
    cosine_weight: float = 1.0
    task_weight: float = 2.0
    learning_rate: float = 1e-4
    search: SearchSpace = field(
        default_factory=lambda: {
            "learning_rate": LEARNING_RATES,
            "temperature": Choice((1.0, 2.0, 4.0, 8.0)),
            "logits_weight": Span(0.5, 10.0),
            "cosine_weight": Span(0.1, 10.0),
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
        terms = (
            Term(aspect="logits", weight=self.logits_weight, temperature=self.temperature),
            Term(aspect="hidden", weight=self.cosine_weight, layers="last", distance="cosine"),
            Term(aspect="task", weight=self.task_weight),
        )
        return prepared(teacher, fewer_layers(teacher, budget), (terms, 1.0))
