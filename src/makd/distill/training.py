"""Station 7: the settings of a training run, and the Trainer's arguments that they stand for."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from makd.errors import SettingError
from makd.kinds import checked

KEPT_CHECKPOINTS = 2
AT_THE_END = 10**9
"""`save_every` of a training that keeps its end alone, which the Trainer does in any case."""
OF_NO_WEIGHT = ("log_every", "report_to", "save_every", "shard_teacher")
"""Settings of a training that change no weight."""
CHECKPOINT_SIZES = 3 * (KEPT_CHECKPOINTS + 1)
"""Room for a training's checkpoints, in sizes of its model: weights and AdamW's two moments, and one more than are kept
while it is written."""


@dataclass(frozen=True, kw_only=True)
@checked("training")
class TrainingConfig:
    """How long and how fast the student learns. What is not here is `transformers.TrainingArguments`' default."""

    steps: int | None = None
    """Optimizer steps; None trains for `epochs`; 0 leaves the student as it was factorized."""
    epochs: float = 3.0
    """Passes over the training rows, where `steps` is not given."""
    batch_size: int = 16
    """Rows of a forward, in each process; where rows differ in length, on average."""
    tokens_per_batch: int | None = None
    """Tokens of a forward, in each process, padding counted: many short rows or few long ones, of like length; in
    evaluations during the training, too. None takes as many as `batch_size` rows of average length have; a fine-tuning
    then takes rows as they come."""
    accumulate: int = 1
    """Forwards of an optimizer step, in each process."""
    learning_rate: float = 1e-4
    """Peak of the schedule. A good start wants a small one: too large a first step throws it away."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises from 0, in [0, 1)."""
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after that."""
    weight_decay: float = 0.0
    """AdamW's; biases and norms do not decay."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: forwards under autocast. Parameters and optimizer are in float32 whatever is said here."""
    teacher_dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of the teacher's products while the student learns; None: as `precision` says."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward instead of keeping their activations: slower, smaller."""
    student_dropout: bool = False
    """Whether the student's dropout is on in training."""
    trainable: Literal["all", "linears", "adapters"] = "all"
    """Which parameters learn: all, those of the factorizable linears only, or LoRA adapters on the factors, which are
    merged into them at the end."""
    adapter_rank: int = 16
    """With `adapters`: their rank; their scale is 2."""
    log_every: int = 10
    """Steps between log lines."""
    evaluate_every: int | None = None
    """Steps between evaluations of the plan's loss on held-out rows; None does none of these."""
    save_every: int | None = None
    """Steps between checkpoints, from which `--resume` goes on; None keeps none."""
    shard_teacher: bool = False
    """Whether the teacher is spread over the processes, under FSDP2, and not whole in each."""
    report_to: str = "none"
    """`none`, `tensorboard`, `wandb`, … as the Trainer takes it."""

    def __post_init__(self) -> None:
        checks = {
            "steps": (self.steps is None or self.steps >= 0, "at least 0, or null to train for `epochs`"),
            "epochs": (self.epochs > 0, "above 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "tokens_per_batch": (self.tokens_per_batch is None or self.tokens_per_batch >= 1, "at least 1, or null"),
            "accumulate": (self.accumulate >= 1, "at least 1"),
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "warmup": (0 <= self.warmup < 1, "a share of the steps, in [0, 1)"),
            "weight_decay": (self.weight_decay >= 0, "at least 0"),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0"),
            "adapter_rank": (self.adapter_rank >= 1, "at least 1"),
            "log_every": (self.log_every >= 1, "at least 1"),
            "evaluate_every": (self.evaluate_every is None or self.evaluate_every >= 1, "at least 1, or null"),
            "save_every": (self.save_every is None or self.save_every >= 1, "at least 1, or null"),
        }
        for name, (fine, allowed) in checks.items():
            if not fine:
                raise SettingError(f"training.{name} is {allowed}; got {getattr(self, name)}.")
        _check_report_to(self.report_to)

    def of_weights(self) -> "TrainingConfig":
        """These settings with the defaults of those that change no weight: equal where the same weights are made."""
        idle = {*OF_NO_WEIGHT, *(() if self.steps is None else ("epochs",))}
        kept = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in idle}
        return TrainingConfig(**kept)

    def find_tokens(self, lengths: Sequence[int]) -> int:
        """`tokens_per_batch`, for rows of these lengths; no fewer than the longest row has."""
        mean = self.batch_size * sum(lengths) / max(1, len(lengths))
        return max(round(mean) if self.tokens_per_batch is None else self.tokens_per_batch, *lengths, 1)

    def find_steps(self, batches: int) -> int:
        """Optimizer steps, where an epoch has so many batches in each process."""
        epochs = math.ceil(self.epochs * math.ceil(batches / self.accumulate))
        return epochs if self.steps is None else self.steps

    def find_teacher_dtype(self) -> torch.dtype | None:
        """`teacher_dtype`, as `DistillTrainer` takes it."""
        return {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}[self.teacher_dtype]

    def check_teacher_dtype(self, dtype: str, *, cached: bool) -> None:
        """Refuse a `teacher_dtype` that means nothing for a teacher that runs in `dtype`, or answers from a cache.

        Raises:
            SettingError: its products would be what they are without it.
        """
        if self.teacher_dtype is None:
            return
        if cached:
            raise SettingError(
                f"training.teacher_dtype is {self.teacher_dtype}, and a cache answers for the teacher, as it was when "
                "the cache was made. Leave out one of them."
            )
        if dtype == "bfloat16" or (dtype == "float16" and self.teacher_dtype == "float32"):
            raise SettingError(
                f"training.teacher_dtype is {self.teacher_dtype}, and does nothing beside dtype {dtype}, in which the "
                "teacher's parameters are: so are its products. Leave it out, or take dtype float32."
            )

    def with_products_in(self, dtype: torch.dtype) -> "TrainingConfig":
        """These settings for models that run in `dtype`: in bfloat16, so do the student's products, by autocast.

        In float16 the student's stay in float32: gradients would need to be scaled to fit.
        """
        return replace(self, precision="bfloat16") if dtype == torch.bfloat16 else self

    def check_launch(self) -> None:
        """Refuse a launcher that would change `precision`; a bfloat16 that is said here always counts.

        Raises:
            SettingError: accelerate was told to mix precisions, and the Trainer would, without a word.
        """
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.precision == "float32" and launched != "no":
            raise SettingError(
                f"training.precision is float32, and accelerate was told to mix it with {launched} (mixed_precision in "
                "its config or of `accelerate launch`; ACCELERATE_MIXED_PRECISION). Set that to no; with "
                "training.precision bfloat16, if bf16 is what was meant."
            )

    def to_arguments(self, output: Path, seed: int, use_cpu: bool) -> TrainingArguments:
        """The Trainer's arguments; checkpoints go to `output`.

        Raises:
            SettingError: as `check_launch` raises it.
        """
        self.check_launch()
        return TrainingArguments(
            output_dir=str(output),
            max_steps=-1 if self.steps is None else self.steps,
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulate,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup,
            lr_scheduler_type=self.schedule,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            bf16=self.precision == "bfloat16",
            activation_checkpointing=self.gradient_checkpointing,
            train_sampling_strategy="group_by_length",
            length_column_name="length",
            include_num_input_tokens_seen="non_padding",
            remove_unused_columns=False,
            logging_steps=self.log_every,
            eval_strategy="no" if self.evaluate_every is None else "steps",
            eval_steps=self.evaluate_every,
            save_strategy="no" if self.save_every is None else "steps",
            save_steps=self.save_every or 500,
            save_total_limit=KEPT_CHECKPOINTS,
            report_to=self.report_to,
            seed=seed,
            data_seed=seed,
            use_cpu=use_cpu,
            disable_tqdm=True,
            dataloader_pin_memory=not use_cpu,
        )


def _check_report_to(name: str) -> None:
    """Refuse, before the factorization, a logger that training would ask for after it, and is not installed."""
    if name not in ("none", "all"):
        available = ("none", "all", *get_available_reporting_integrations())
        if name not in available:
            raise SettingError(
                f"training.report_to is one of those that are installed here ({', '.join(available)}); got {name!r}."
            )
