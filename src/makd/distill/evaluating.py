"""Station 7: evaluations during training, whose loss is that of all rows, however these are split.

Transformers takes the mean of the batches' losses, in which a row of a small batch counts for more, and rows that fill
up the last batches of several processes count twice.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from makd.distill.batched import BatchingTrainer
from makd.distill.engines import real_rows
from makd.distill.shares import RunningMeans


class EvaluatingTrainer(BatchingTrainer, ABC):
    """Transformers' Trainer, whose evaluation loss is a mean over all that is counted, of every row once."""

    evaluated: RunningMeans
    """Of the evaluation that is going on."""

    @abstractmethod
    def _predict(
        self, model: nn.Module, inputs: Mapping[str, Any], *, with_logits: bool, noted: bool
    ) -> tuple[Tensor, Any]:
        """Loss and output of one batch; its losses go to `evaluated` where they are to be `noted`."""

    @abstractmethod
    def _sum_up(self, means: Mapping[str, float]) -> dict[str, float]:
        """What an evaluation tells, `loss` among it, from the means of `evaluated`."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, whose loss is a mean over all that is counted, as in training, and not one of batches."""
        self.evaluated = RunningMeans(self.evaluated.terms)
        found = super().evaluation_loop(*args, **kwargs)
        means = self.evaluated.take(self.args.device)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics: Any = found.metrics
        if means and f"{prefix}_loss" in metrics:
            metrics.update({f"{prefix}_{name}": value for name, value in self._sum_up(means).items()})
        return found

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The loss on an evaluation batch, and the model's logits and the labels for metrics."""
        inputs = self._prepare_inputs(inputs)
        labels = [inputs[name] for name in self.label_names if inputs.get(name) is not None]
        if not (labels or self.can_return_loss):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        rows = len(inputs["input_ids"])
        real = real_rows(self, rows)
        # engines want a forward of every process: one that has nothing left takes a row that does not count
        few = inputs if real == rows else {name: value[: max(1, real)] for name, value in inputs.items()}
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, output = self._predict(model, few, with_logits=not prediction_loss_only, noted=real > 0)
            loss = loss.detach()
            if prediction_loss_only:
                return loss, None, None
            if real < rows:  # metrics are gathered from batches of one size
                _, output = self._predict(model, inputs, with_logits=True, noted=False)
        logits = [value for name, value in output.items() if name.endswith("logits")]
        return loss, _as_one(logits), _as_one(labels)


def _as_one(tensors: Sequence[Tensor]) -> Any:
    """As metrics take them: several of a model that finds places, where they start and where they end."""
    return (tensors[0] if len(tensors) == 1 else tuple(tensors)) if tensors else None
