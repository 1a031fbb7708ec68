"""Station 7: teaching the student, as a `transformers.Trainer`."""

from makd.distill.identity import check_same_run, identify_run, with_start, write_identity
from makd.distill.objective import aspect_losses, weighted_sum
from makd.distill.precision import float32_weights
from makd.distill.reporting import ReportSteps
from makd.distill.resuming import train
from makd.distill.supervised import SupervisedTrainer
from makd.distill.trainer import DistillTrainer
from makd.distill.training import CHECKPOINT_SIZES, TrainingConfig, choose_trainable_

__all__ = [
    "CHECKPOINT_SIZES",
    "DistillTrainer",
    "ReportSteps",
    "SupervisedTrainer",
    "TrainingConfig",
    "aspect_losses",
    "check_same_run",
    "choose_trainable_",
    "float32_weights",
    "identify_run",
    "train",
    "weighted_sum",
    "with_start",
    "write_identity",
]
