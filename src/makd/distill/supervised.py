"""Station 7, without a teacher: plain fine-tuning on labels, with the same settings as distillation."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from makd.anatomy import predictions_of
from makd.anatomy.key_cache import cache_setting_kept, without_cache
from makd.distill.dropout import switch_dropout_off_
from makd.distill.objective import check_labels, task_loss
from makd.distill.precision import check_precision
from makd.distill.soundness import StopWhereBroken
from makd.distill.steps import training_step
from makd.errors import NumericsError


class SupervisedTrainer(Trainer):
    """Transformers' Trainer with the model's own loss, a batch's mean over the rows that have a label."""

    def __init__(self, model: PreTrainedModel, dropout: bool = True, **kwargs: Any) -> None:
        """Arguments besides these are `transformers.Trainer`'s.

        Args:
            model: with the head of a task.
            dropout: whether the model's dropout is on in training.
            kwargs: `args`, `train_dataset`, `data_collator`, `callbacks`, …
        """
        check_precision(model)
        self.dropout = dropout
        self.predictions = predictions_of(model)
        with cache_setting_kept(model):
            super().__init__(model=model, **kwargs)
        self.add_callback(StopWhereBroken())
        self.model_accepts_loss_kwargs = False  # the loss is a batch's mean: the Trainer divides it when it accumulates

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's: loss and backward of one batch."""
        with training_step(model, inputs, self.args, self.dropout):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss on the labels. The Trainer calls it.

        Raises:
            NumericsError: it is NaN or infinite, which training would never recover from.
        """
        if model.training and not self.dropout:
            switch_dropout_off_(model)
        check_labels(inputs, self.predictions)
        with without_cache(self.accelerator.unwrap_model(model)):
            output = model(**inputs)
        loss = task_loss(inputs, output, self.predictions)
        if not bool(torch.isfinite(loss)):
            raise NumericsError(
                f"The loss on the labels is {float(loss.detach())}: training diverged. Lower the learning rate; if "
                "it is so from the first step on, look at the labels for numbers that are far too large."
            )
        return (loss, output) if return_outputs else loss
