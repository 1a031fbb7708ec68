"""Baseline: MiniLMv2.

Paper: Wang et al. (arXiv 2012.15828). Kept: self-relations of queries, keys and values of the student's last layer with
those of a chosen layer of the teacher's, in a number of relation heads that need not be the number of heads;
fine-tuning on the labels after it. Different: it is distilled on the task's text and not on Wikipedia and books, so
that a student cut out of the teacher is the default start. The paper's teachers of 12 layers are compared at the last
one, of 24 at the 21st.
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
class MiniLMv2:
    """Narrower; relations of queries, keys and values at one layer, then labels."""

    depth: int | None = None
    """Layers; None: as many as the teacher has."""
    initial: Initial = "cut"
    relation_heads: int | None = None
    """Parts of queries, keys and values; None: the number of key heads. The paper has 48 for a width of 768."""
    teacher_layer: int = -1
    """Counted from 0, or from the end where it is negative."""
    layer_share: float = 0.5
    """Of the steps, for the first stage, in (0, 1)."""
    learning_rate: float = 3e-4
    search: SearchSpace = field(
        default_factory=lambda: {
            "learning_rate": LEARNING_RATES,
            "initial": Choice(("cut", "random")),
            "teacher_layer": Choice((-1, -2)),
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
        config = teacher.config
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        heads = self.relation_heads or key_heads
        # keys of grouped heads are a part of the width, which relation heads have to divide too
        multiple = heads * config.num_attention_heads // key_heads
        student = narrower(teacher, budget, depth=self.depth, initial=self.initial, multiple=multiple, seed=seed)
        relations = (Term(aspect="relation", layers="last", teacher_layers=[self.teacher_layer], relation_heads=heads),)
        return prepared(teacher, student, (relations, self.layer_share), ((Term(aspect="task"),), 1 - self.layer_share))
