"""Station 7: teaching the student, as a `transformers.Trainer`."""

from makd.distill.apart import check_apart
from makd.distill.engines.sharded import in_pieces, teaching_in_pieces
from makd.distill.engines.support import check_engine
from makd.distill.fitting import TrainingRows, check_stage, check_training
from makd.distill.layerwise.settings import LayerwiseConfig
from makd.distill.layerwise.student import LayerTeacher, teach_layers_
from makd.distill.layerwise.training import LayerTrainingResult, check_teachable, teach_layer_
from makd.distill.lengths import training_lengths
from makd.distill.losses.objective import aspect_losses, weighted_sum
from makd.distill.precision import float32_weights, warn_slow_bfloat16
from makd.distill.reporting import ReportSteps
from makd.distill.resuming.identity import (
    check_same_everywhere,
    check_same_run,
    identify_run,
    with_start,
    write_identity,
)
from makd.distill.resuming.train import train
from makd.distill.supervised import SupervisedTrainer
from makd.distill.trainable import check_adapters, learning
from makd.distill.trainer import DistillTrainer
from makd.distill.training import AT_THE_END, CHECKPOINT_SIZES, TrainingConfig

__all__ = [
    "AT_THE_END",
    "CHECKPOINT_SIZES",
    "DistillTrainer",
    "LayerTeacher",
    "LayerTrainingResult",
    "LayerwiseConfig",
    "ReportSteps",
    "SupervisedTrainer",
    "TrainingConfig",
    "TrainingRows",
    "aspect_losses",
    "check_adapters",
    "check_apart",
    "check_engine",
    "check_same_everywhere",
    "check_same_run",
    "check_stage",
    "check_teachable",
    "check_training",
    "float32_weights",
    "identify_run",
    "in_pieces",
    "learning",
    "teach_layer_",
    "teach_layers_",
    "teaching_in_pieces",
    "train",
    "training_lengths",
    "warn_slow_bfloat16",
    "weighted_sum",
    "with_start",
    "write_identity",
]
