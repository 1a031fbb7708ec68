"""Baseline: a student without those layers that change least, then one of the objectives of causal language models.

Papers: ShortGPT (Men et al., arXiv 2403.03853), whose measure says which layers go; Minitron (Muralidharan et al.,
arXiv 2407.14679) teaches what is left from its teacher. Kept: block influence, measured once; distillation of the
predictions (preset `logits`), or any other objective. Different: where whole layers do not meet the budget, one more
stays, and the feed-forward of all is narrower.
"""

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from makd.aspects import PRESETS, Plan, activate
from makd.baselines.influence import by_influence
from makd.baselines.method import LEARNING_RATES, Batches, MakeStart, PlannedStage, PreparedStudent, SearchSpace
from makd.baselines.shallow import fewer_layers
from makd.capture import examine
from makd.errors import SettingError
from makd.kinds import checked
from makd.ranks.budget import Budget


@dataclass(frozen=True, kw_only=True)
@checked("settings")
class DroppedLayers:
    """Layers that change their input most, and a preset."""

    objective: str = "logits"
    """The preset: `logits`, `sft`, `seq_kd`, `gkd`, or any other of `PRESETS`."""
    learning_rate: float = 1e-4
    search: SearchSpace = field(default_factory=lambda: {"learning_rate": LEARNING_RATES}, repr=False)

    def __post_init__(self) -> None:
        PRESETS[self.objective]

    def prepare(
        self,
        teacher: PreTrainedModel,
        budget: Budget,
        calibration: Batches | None = None,
        seed: int = 0,
        begin: MakeStart | None = None,
    ) -> PreparedStudent:
        """See `Baseline`."""
        if calibration is None:
            raise SettingError("Which layers change least is measured on text: give the baseline calibration batches.")
        student = fewer_layers(teacher, budget, by_influence(teacher, calibration))
        plan = Plan(preset=self.objective)
        activate(plan, examine(student), examine(teacher))
        return PreparedStudent(student=student, stages=(PlannedStage(plan=plan),))
