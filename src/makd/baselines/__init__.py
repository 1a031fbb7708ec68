"""What makd is compared with: other methods' students and plans, of the same parts, for the same trainer.

made = BASELINES["pkd"].prepare(teacher, makd.Budget(keep_linears=0.5)) for stage, steps in zip(made.stages,
made.steps(1000), strict=True): makd.DistillTrainer(made.student, teacher, stage.plan, args=...,
train_dataset=...).train()
"""

from makd.baselines.distilbert import DistilBert
from makd.baselines.dropped_layers import DroppedLayers
from makd.baselines.low_rank import LowRankFineTuning
from makd.baselines.low_rank_feature import LowRankFeature
from makd.baselines.low_rank_logits import LowRankLogits
from makd.baselines.low_rank_objective import LowRankObjective
from makd.baselines.makd_best import BestMakd
from makd.baselines.makd_paper import PaperMakd
from makd.baselines.method import Baseline, Choice, PlannedStage, PreparedStudent, SearchSpace, Span
from makd.baselines.minilm import MiniLM
from makd.baselines.minilm_v2 import MiniLMv2
from makd.baselines.narrow import narrower
from makd.baselines.pkd import PatientDistillation
from makd.baselines.shallow import fewer_layers
from makd.baselines.tinybert import TinyBert
from makd.registry import Registry

BASELINES: Registry[Baseline] = Registry(
    "baseline",
    {
        "low_rank_svd": LowRankFineTuning(start="svd"),
        "low_rank_fisher": LowRankFineTuning(start="fisher"),
        "low_rank_whitened": LowRankFineTuning(start="whitened"),
        "low_rank_regression": LowRankFineTuning(start="regression"),
        "low_rank_logits": LowRankLogits(),
        "low_rank_feature": LowRankFeature(),
        "low_rank_objective": LowRankObjective(),
        "low_rank_lora": LowRankObjective(trainable="adapters", learning_rate=2e-4),
        "dropped_layers": DroppedLayers(),
        "distilbert": DistilBert(),
        "pkd": PatientDistillation(),
        "tinybert": TinyBert(),
        "minilm": MiniLM(),
        "minilm_v2": MiniLMv2(),
        "makd_paper": PaperMakd(),
        "makd": BestMakd(),
    },
)
"""Methods by name, each with hyper-parameters to begin with; `dataclasses.replace` gives one with others."""

__all__ = [
    "BASELINES",
    "Baseline",
    "BestMakd",
    "Choice",
    "DistilBert",
    "DroppedLayers",
    "LowRankFeature",
    "LowRankFineTuning",
    "LowRankLogits",
    "LowRankObjective",
    "MiniLM",
    "MiniLMv2",
    "PaperMakd",
    "PatientDistillation",
    "PlannedStage",
    "PreparedStudent",
    "SearchSpace",
    "Span",
    "TinyBert",
    "fewer_layers",
    "narrower",
]
