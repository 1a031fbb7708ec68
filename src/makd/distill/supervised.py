"""Station 7, without a teacher: plain fine-tuning on labels, with the same settings as distillation."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import predictions_of
from makd.anatomy.key_cache import without_cache
from makd.distill.dropout import switch_dropout_off_
from makd.distill.losses.counted import count_labels
from makd.distill.losses.objective import check_labels, task_loss
from makd.distill.losses.shares import SHARE, RunningMeans, step_shares
from makd.distill.mean_loss_trainer import MeanLossTrainer
from makd.distill.precision import check_precision
from makd.errors import NumericsError
from makd.processes.started import process_count

TASK = "task"
"""What the loss on the labels is called among means."""


class SupervisedTrainer(MeanLossTrainer):
    """Transformers' Trainer with the model's own loss, a mean over those rows of a step that have a label."""

    def __init__(self, model: PreTrainedModel, dropout: bool = True, **kwargs: Any) -> None:
        """Arguments besides these are `transformers.Trainer`'s.

        Args:
            model: with the head of a task.
            dropout: whether the model's dropout is on in training.
            kwargs: `args`, `train_dataset`, `data_collator`, `callbacks`, …; `tokens_per_batch` of `MeanLossTrainer`.
        """
        check_precision(model)
        self.predictions = predictions_of(model)
        super().__init__(model, model, RunningMeans({TASK: (TASK,)}), dropout=dropout, **kwargs)
        self.model_accepts_loss_kwargs = False  # the model's loss is a batch's mean

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The Trainer's batches of an optimizer step, each with its share of the step's labels."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, items
        counts = [torch.as_tensor(self._count(batch), device=self.args.device).float() for batch in batches]
        shares = step_shares(torch.stack(counts)[:, None])
        return [{**batch, SHARE: share} for batch, [share] in zip(batches, shares, strict=True)], items

    def _count(self, batch: Mapping[str, Any]) -> Tensor | int:
        return count_labels(batch, 0 if self.predictions is None else self.predictions.label_shift)

    def _predict(
        self, model: nn.Module, inputs: Mapping[str, Any], *, with_logits: bool, noted: bool
    ) -> tuple[Tensor, Any]:
        loss, output = self.compute_loss(model, dict(inputs), return_outputs=True)
        if noted:
            self.evaluated.add({TASK: loss}, {TASK: float(self._count(inputs))})
        return loss, output

    def _sum_up(self, means: Mapping[str, float]) -> dict[str, float]:
        return {"loss": means[TASK]}

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
        own = self.accelerator.unwrap_model(model)
        if own.training and not self.dropout:  # an engine's own mode is not always its model's
            switch_dropout_off_(own)
        share, inputs = inputs.get(SHARE), {name: value for name, value in inputs.items() if name != SHARE}
        check_labels(inputs, self.predictions)
        with without_cache(own):
            output = model(**inputs)
        loss = task_loss(inputs, output, self.predictions)
        if not bool(torch.isfinite(loss)):
            raise NumericsError(
                f"The loss on the labels is {float(loss.detach())}: training diverged. Lower the learning rate; if "
                "it is so from the first step on, look at the labels for numbers that are far too large."
            )
        if share is not None:
            loss = loss * (share * process_count())  # engines take the mean of the processes' gradients
        return (loss, output) if return_outputs else loss
