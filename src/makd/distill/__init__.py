"""Station 7: teaching the student, as a `transformers.Trainer`."""

from makd.distill.objective import aspect_losses, weighted_sum
from makd.distill.precision import float32_weights
from makd.distill.reporting import ReportSteps
from makd.distill.resuming import train
from makd.distill.supervised import SupervisedTrainer
from makd.distill.trainer import DistillTrainer
from makd.distill.training import TrainingConfig, choose_trainable_

__all__ = [
    "DistillTrainer",
    "ReportSteps",
    "SupervisedTrainer",
    "TrainingConfig",
    "aspect_losses",
    "choose_trainable_",
    "float32_weights",
    "train",
    "weighted_sum",
]
