"""Baseline: TinyBERT's task-specific distillation.

Paper: Jiao et al. (arXiv 1909.10351). Kept: a narrower student; hidden states through a learned projection that all
layers share, and attention, at a uniform layer map; then, in a stage of its own, soft predictions at temperature 1.
Different: attention is compared as KL of distributions, not as squared difference of scores, since that would need the
score matrices; there is no loss at the embeddings' output; hidden losses are in units of the teacher's variance; no
general distillation comes before, and no data augmentation, so that a student cut out of the teacher is the default
start.
"""

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from makd.aspects import Term
from makd.baselines.method import LEARNING_RATES, Batches, Choice, MakeStart, PreparedStudent, SearchSpace, prepared
from makd.baselines.narrow import Initial, narrower
from makd.kinds import checked
from makd.ranks.budget import Budget


@dataclass(frozen=True, kw_only=True)
@checked("settings")
class TinyBert:
    """Narrower; projected hidden states and attention, then predictions."""

    depth: int | None = None
    """Layers; None: as many as the teacher has."""
    initial: Initial = "cut"
    layer_share: float = 0.5
    """Of the steps, for the first stage, in (0, 1)."""
    temperature: float = 1.0
    learning_rate: float = 3e-4
    search: SearchSpace = field(
        default_factory=lambda: {
            "learning_rate": LEARNING_RATES,
            "initial": Choice(("cut", "random")),
            "layer_share": Choice((0.3, 0.5, 0.7)),
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
        student = narrower(teacher, budget, depth=self.depth, initial=self.initial, seed=seed)
        return prepared(
            teacher,
            student,
            ((Term(aspect="hidden"), Term(aspect="attention")), self.layer_share),
            ((Term(aspect="logits", temperature=self.temperature),), 1 - self.layer_share),
        )
