"""The settings of a whole run: one frozen dataclass, the same object in Python, in YAML and as flags.

Each stage's own settings stand beside their stage; only `pipeline` and `cli` see the whole.
"""

import functools
import logging
from dataclasses import dataclass, field

import torch

from makd.aspects import Plan
from makd.devices import check_float64, has_float64
from makd.distill import LayerTeacher, LayerwiseConfig, TrainingConfig
from makd.errors import SettingError
from makd.factorization.settings import FactorizeConfig
from makd.kinds import checked
from makd.loading import HEADS, check_dtype
from makd.processes.started import check_device, group, process_count
from makd.sentence_encoder import AUTO, check_pooling
from makd.storage import check_save_dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
@checked("calibration")
class CalibrationConfig:
    """Which part of the training text the solvers see."""

    rows: int = 400
    """Rows (encoders) or blocks (decoders) of the training data."""
    batch_size: int = 16
    """Rows of a forward."""

    def __post_init__(self) -> None:
        _at_least_one("calibration.rows", self.rows)
        _at_least_one("calibration.batch_size", self.batch_size)


@dataclass(frozen=True, kw_only=True)
@checked("evaluation")
class EvaluationConfig:
    """What is measured on held-out rows."""

    rows: int = 200
    """Held-out rows, at most."""
    batch_size: int = 16
    """Rows of a forward."""
    pooling: str = AUTO
    """How a text's vector is made of a sentence encoder's hidden states: as a term's `pooling`."""
    stride: int | None = None
    """Measure the perplexity of a causal language model on the held-out texts as one long text, too: tokens by which a
    window of `data.max_length` moves on. None measures it in blocks alone."""
    latency: bool = True
    """Whether forwards are timed, at batch 1 and 16."""
    latency_tokens: int = 128
    """Tokens of a row in the timed forwards."""
    samples: int = 4
    """Held-out texts that are kept in `report/samples.json`, with what teacher and student make of them. 0 keeps no
    text of the data."""

    def __post_init__(self) -> None:
        check_pooling(self.pooling, "evaluation.pooling")
        _at_least_one("evaluation.rows", self.rows)
        _at_least_one("evaluation.batch_size", self.batch_size)
        if self.stride is not None:
            _at_least_one("evaluation.stride", self.stride)
        _at_least_one("evaluation.latency_tokens", self.latency_tokens)
        if self.samples < 0:
            raise SettingError(f"evaluation.samples is a number of texts, 0 for none; got {self.samples}.")


@dataclass(frozen=True, kw_only=True)
@checked("recipe.stages[]")
class Stage:
    """One of several trainings that follow each other."""

    plan: Plan = field(default_factory=Plan)
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True, kw_only=True)
@checked("recipe")
class Recipe:
    """How a student is made, whatever the teacher, data and budget."""

    head: str = "auto"
    """Which head the teacher is loaded with: `auto` takes the checkpoint's own; or one of `makd.loading.HEADS`."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    factorize: FactorizeConfig = field(default_factory=FactorizeConfig)
    layerwise: LayerwiseConfig = field(default_factory=LayerwiseConfig)
    """Teaches each layer as soon as it is made, by what of the (first) plan is inside it."""
    plan: Plan = field(default_factory=Plan)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    stages: tuple[Stage, ...] = ()
    """Trainings that follow each other, each with a plan and a schedule of its own, instead of the one above."""
    cache: str | None = None
    """Folder that `makd cache` made of this teacher, data, seed and plan: training steps then read it instead of asking
    the teacher. None asks the teacher."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    dtype: str = "float32"
    """dtype that teacher and student run in: float32, bfloat16 or float16. While it learns, a student's parameters are
    in float32 all the same, and its products in bfloat16 if this is."""
    save_dtype: str = "auto"
    """dtype of the student on disk: `auto` keeps the checkpoint's, or takes `dtype` where that is narrower; or float32,
    bfloat16 or float16. It is measured as it is saved."""
    device: str = "auto"
    """`auto` takes an accelerator if there is one that has float64; or `cpu`, `cuda`, …"""
    seed: int = 0
    """Of everything random: which rows are trained on, where not all are, their order, dropout. Held-out rows are the
    same for every seed."""

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_save_dtype(self.save_dtype)
        if self.head != "auto":
            HEADS[self.head]
        if self.cache == "":
            raise SettingError("cache is a folder that `makd cache` made, or null; got an empty name.")
        if self.cache is not None and any(stage.plan.writers.written for stage in self.trainings):
            raise SettingError(
                f"cache is {self.cache}, and the plan has completions written while the student learns, of which a "
                "cache knows nothing. Leave out the cache, or take a plan of the data's own text."
            )
        for stage in self.trainings:
            if stage.training.steps != 0:
                stage.training.check_teacher_dtype(self.dtype, cached=self.cache is not None)
        check_seed("seed", self.seed)
        plain = {"plan": Plan(), "training": TrainingConfig()}
        beside = [name for name in plain if getattr(self, name) != plain[name]]
        if self.stages and beside:
            raise SettingError(
                f"recipe.stages have plans and trainings of their own, and recipe.{' and recipe.'.join(beside)} would "
                "do nothing beside them. Write what is meant into the stages, or leave them out."
            )

    @property
    def trainings(self) -> tuple[Stage, ...]:
        """What is trained, in order: the stages, or the one plan with its training."""
        return self.stages or (Stage(plan=self.plan, training=self.training),)

    def check_launch(self) -> None:
        """Refuse, before any work, trainings that what started this process does not let be as they are here.

        Raises:
            SettingError: as `TrainingConfig.check_launch` raises it.
        """
        for stage in self.trainings:
            if stage.training.steps != 0:
                stage.training.with_products_in(check_dtype(self.dtype)).check_launch()

    @property
    def keeps_checkpoints(self) -> bool:
        """Whether a training that is killed can be gone on with."""
        return any(stage.training.save_every for stage in self.trainings)

    @property
    def learns_by_evaluation(self) -> bool:
        """Whether what a student learns from depends on how well it does on held-out rows."""
        return any(stage.plan.writers.adaptive for stage in self.trainings if stage.training.steps != 0)

    @property
    def uses_bfloat16(self) -> bool:
        """Whether some of the work is done in bfloat16."""
        lessons = (self.layerwise.precision, *(stage.training.precision for stage in self.trainings))
        return "bfloat16" in (self.dtype, *lessons)

    @property
    def layer_teacher(self) -> LayerTeacher | None:
        """What teaches layers while they are made; None where they are not to be."""
        if self.layerwise.steps == 0:
            return None
        settings = self.layerwise.with_products_in(check_dtype(self.dtype))
        return LayerTeacher(self.trainings[0].plan, settings, self.seed)

    def find_device(self) -> torch.device:
        """The device that `device` means on this machine.

        Raises:
            SettingError: this machine has no such device.
        """
        return find_device(self.device)


FINETUNING: TrainingConfig = TrainingConfig(
    learning_rate=5e-5, schedule="linear", weight_decay=0.01, student_dropout=True
)
"""Devlin et al. (2019): the largest of BERT's learning rates, which small encoders want, 3 epochs, dropout as in the
model."""
OF_DISTILLATION = ("teacher_dtype", "shard_teacher")
"""Settings of a training that a fine-tuning has no use for."""


@dataclass(frozen=True, kw_only=True)
@checked("recipe")
class FinetuneRecipe:
    """How a model is taught a task from its labels alone."""

    training: TrainingConfig = field(default_factory=lambda: FINETUNING)
    """Its defaults differ from distillation's: see `FINETUNING`."""
    evaluation_batch_size: int = 32
    """Rows of a forward while it is measured."""
    dtype: str = "float32"
    """dtype that the model runs in: float32, bfloat16 or float16. While it learns, its parameters are in float32 all
    the same, and its products in bfloat16 if this is."""
    save_dtype: str = "auto"
    """dtype of the model on disk: `auto` keeps the checkpoint's, or takes `dtype` where that is narrower."""
    device: str = "auto"
    """`auto` takes an accelerator if there is one; or `cpu`, `cuda`, …"""
    seed: int = 0
    """Of everything random: a new head, order of the rows, dropout. Held-out rows are the same for every seed."""

    def __post_init__(self) -> None:
        plain = TrainingConfig()
        idle = [name for name in OF_DISTILLATION if getattr(self.training, name) != getattr(plain, name)]
        if idle:
            raise SettingError(
                f"recipe.training.{idle[0]} is of distillation, and a fine-tuning does nothing with it; got "
                f"{getattr(self.training, idle[0])!r}. Leave it out."
            )
        check_dtype(self.dtype)
        check_save_dtype(self.save_dtype)
        _at_least_one("evaluation_batch_size", self.evaluation_batch_size)
        check_seed("seed", self.seed)

    @property
    def uses_bfloat16(self) -> bool:
        """Whether some of the work is done in bfloat16."""
        return "bfloat16" in (self.dtype, self.training.precision)

    def find_device(self) -> torch.device:
        """The device that `device` means on this machine.

        Raises:
            SettingError: this machine has no such device.
        """
        return find_device(self.device, wide=False)


def find_device(name: str, *, wide: bool = True) -> torch.device:
    """The device called `name` on this machine; `auto` is an accelerator if there is one.

    Args:
        name: as in a recipe.
        wide: whether it has to have float64, as where a model is factorized.

    Raises:
        SettingError: it is not there, is not this process's of several, or has no float64.
    """
    if name.partition(":")[0] == "meta":
        raise SettingError("device 'meta' holds no numbers, so nothing can be computed on it. Take auto, cpu or cuda.")
    if process_count() > 1:
        group()  # makes each process's own accelerator the current one
    device = _accelerator(wide) if name == "auto" else _named_device(name)
    if wide:
        check_float64(device)
    check_device(device)
    return device


def _accelerator(wide: bool) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    if wide and not has_float64(accelerator):
        _warn_skipped(accelerator)
        return torch.device("cpu")
    return accelerator


@functools.cache
def _warn_skipped(accelerator: torch.device) -> None:
    """Once: a run asks for its device several times."""
    logger.warning(
        "The accelerator of this machine, %s, has no float64, which moments and factors are computed in: the CPU is "
        "used instead",
        accelerator,
    )


def _named_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"device {name!r} is not there: {str(error).splitlines()[0]}") from error


def check_seed(name: str, value: int) -> None:
    """Refuse a seed that torch, numpy and Python do not take alike.

    Raises:
        SettingError: `value` is below 0, or 2^32 or more.
    """
    if not 0 <= value < 2**32:
        raise SettingError(f"{name} is at least 0 and less than 2^32; got {value}.")


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise SettingError(f"{name} is at least 1; got {value}.")
