"""Station 7: teaching the student, as a `transformers.Trainer`."""

from makd.distill.objective import aspect_losses, weighted_sum
from makd.distill.reporting import ReportSteps
from makd.distill.trainer import DistillTrainer
from makd.distill.training import TrainingConfig

__all__ = ["DistillTrainer", "ReportSteps", "TrainingConfig", "aspect_losses", "weighted_sum"]
