"""Station 7: arguments of the Trainer that a plan's loss has no use for, or cannot be computed with.

Each is refused when a `DistillTrainer` is made: the Trainer would take it, and the student would learn something else
than what was asked for.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from makd.aspects import ActivePlan
from makd.errors import SettingError


def check_stream(tokens_per_batch: int | None, rows: Any) -> None:
    """Refuse batches of so many tokens for a stream.

    Raises:
        SettingError: `tokens_per_batch` is given and the training rows are a stream.
    """
    if tokens_per_batch is not None and rows is not None and not hasattr(rows, "__len__"):
        raise SettingError(
            f"tokens_per_batch = {tokens_per_batch} puts rows of like length together, and {type(rows).__name__} is a "
            "stream, whose lengths nobody knows. Give per_device_train_batch_size in `args` instead."
        )


def check_loss(args: Any, own_loss: Any, eval_dataset: Any, plan: ActivePlan) -> None:
    """Refuse what the Trainer would do with a loss, and the plan's does not.

    Raises:
        SettingError: `args` smooth labels, a `compute_loss_func` is given, or an adaptive share has several evaluation
            sets to follow.
    """
    if own_loss is not None or getattr(args, "label_smoothing_factor", None):
        name = "label_smoothing_factor" if own_loss is None else "compute_loss_func"
        raise SettingError(f"The loss of a DistillTrainer is its plan's, and {name} would do nothing. Leave it out.")
    if plan.completions.adaptive and isinstance(eval_dataset, Mapping):
        raise SettingError(
            "plan.completions.adaptive follows the loss on one evaluation set, and eval_dataset has "
            f"{len(eval_dataset)} by name. Give one."
        )


def check_checkpoints_layers(model: PreTrainedModel) -> None:
    """Refuse gradient checkpointing of a model whose class does none.

    Raises:
        SettingError: layers of `model` cannot be computed again in the backward.
    """
    if not model.supports_gradient_checkpointing:
        raise SettingError(
            f"training.gradient_checkpointing is true, and {type(model).__name__} cannot compute its layers again in "
            "the backward. Leave it out; fewer rows at once (training.batch_size, training.accumulate) take less, too."
        )


def check_checkpointing(args: Any) -> None:
    """Refuse gradient checkpointing through which captured tensors carry no gradient.

    Raises:
        SettingError: `args` have gradient checkpointing with use_reentrant=True.
    """
    settings = args.activation_checkpointing_kwargs or {}
    if args.activation_checkpointing and settings.get("use_reentrant"):
        raise SettingError(
            "activation_checkpointing_kwargs has use_reentrant=True: captured tensors carry no gradient there, and "
            "every aspect but logits would be lost. Set it to False."
        )
