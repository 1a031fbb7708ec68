"""Baseline: MiniLM.

Paper: Wang et al. (arXiv 2002.10957). Kept: attention distributions and value relations of the last layer, with the
teacher's number of heads, in a narrower student without projections; fine-tuning on the labels after it. Different: it
is distilled on the task's text and not on Wikipedia and books, so that a student cut out of the teacher is the default
start; no teacher assistant.
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
class MiniLM:
    """Narrower; attention and value relation of the last layer, then labels."""

    depth: int | None = None
    """Layers; None: as many as the teacher has."""
    initial: Initial = "cut"
    layer_share: float = 0.5
    """Of the steps, for the first stage, in (0, 1)."""
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
        heads = getattr(teacher.config, "num_key_value_heads", None) or teacher.config.num_attention_heads
        relations = (
            Term(aspect="attention", layers="last"),
            Term(aspect="relation", layers="last", roles=("v",), relation_heads=heads),
        )
        return prepared(teacher, student, (relations, self.layer_share), ((Term(aspect="task"),), 1 - self.layer_share))
