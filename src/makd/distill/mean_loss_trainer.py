"""Station 7: transformers' Trainer with what teaching from a teacher and from labels share.

- The loss of an evaluation is that of all rows, however these are split. Transformers takes the mean of the batches'
  losses, in which a row of a small batch counts for more, and rows that fill up the last batches of several processes
  count twice.
- Batches, of an evaluation too, are of so many tokens, of rows of like length, where the Trainer is told how many.
- Batches of whoever's collator are padded on the right before anything is made of them, as all that makd reads.
- What surrounds a step, and what would break a run in silence, is the same with a teacher and without.
- An autocast of the caller's around a training or an evaluation does not reach it, as in all that is public of makd.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from makd.anatomy.key_cache import cache_setting_kept
from makd.anatomy.padding import as_read
from makd.data import TokenBatchSampler, padding_share, row_lengths, token_batches
from makd.data.batches import SIDES
from makd.default_modes import default_modes
from makd.distill.arguments import check_checkpoints_layers, check_stream
from makd.distill.engines.support import real_rows, with_engine
from makd.distill.losses.shares import RunningMeans
from makd.distill.resuming.train import without_tied
from makd.distill.soundness import StopWhereBroken
from makd.distill.steps import training_step

_logger = logging.getLogger(__name__)
_CALLED = ("__init__", "train", "evaluate", "predict")
"""What users call of a trainer."""


class MeanLossTrainer(Trainer, ABC):
    """Transformers' Trainer, whose losses are means over all that is counted, of a step and of an evaluation."""

    loss_is_scaled_for_ga = True  # a batch has its share of the step's loss already

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """What users call of any trainer runs in torch's default modes."""
        super().__init_subclass__(**kwargs)
        for name in _CALLED:
            setattr(cls, name, default_modes()(getattr(cls, name)))

    def __init__(
        self,
        model: nn.Module,
        own: PreTrainedModel,
        evaluated: RunningMeans,
        *,
        dropout: bool,
        tokens_per_batch: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Arguments besides these are `transformers.Trainer`'s.

        Args:
            model: what learns.
            own: the model of transformers in it, as `makd.distill.adapted.inside` finds it.
            evaluated: where the losses of evaluations go.
            dropout: whether the model's dropout is on in training.
            tokens_per_batch: tokens of a batch on each device, padding counted, in training and in evaluations of the
                loss: see `makd.data.token_batches`. None leaves batches to the Trainer.
            kwargs: the Trainer's.

        Raises:
            SettingError: `tokens_per_batch` is given and the training rows are a stream, or activation checkpointing is
                asked for and the model has none.
        """
        self.evaluated, self.dropout, self.tokens_per_batch = evaluated, dropout, tokens_per_batch
        self._reader = own
        kwargs["args"] = with_engine(kwargs.get("args"))
        if kwargs["args"].activation_checkpointing:
            check_checkpoints_layers(own)
        with cache_setting_kept(own):
            super().__init__(model=model, **kwargs)
            check_stream(tokens_per_batch, self.train_dataset)
        self.add_callback(StopWhereBroken())

    @abstractmethod
    def _predict(
        self, model: nn.Module, inputs: Mapping[str, Any], *, with_logits: bool, noted: bool
    ) -> tuple[Tensor, Any]:
        """Loss and output of one batch; its losses go to `evaluated` where they are to be `noted`."""

    @abstractmethod
    def _sum_up(self, means: Mapping[str, float]) -> dict[str, float]:
        """What an evaluation tells, `loss` among it, from the means of `evaluated`."""

    def find_lengths(self, rows: Any) -> list[int]:
        """Tokens of each row, by which batches are made."""
        return row_lengths(rows)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.tokens_per_batch is None:
            return super()._get_train_sampler(rows)
        lengths = self.find_lengths(rows)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        share = padding_share(lengths, token_batches(lengths, self.tokens_per_batch))
        sampler = TokenBatchSampler(
            lengths, self.tokens_per_batch, seed, self.args.process_index, max(1, self.args.world_size)
        )
        _logger.info(
            "%d rows in batches of at most %d tokens: %d an epoch, %.1f %% of the tokens padding",
            len(lengths),
            self.tokens_per_batch,
            sampler.count,
            100 * share,
        )
        return sampler

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        metrics_of_many = self.compute_metrics is not None and self.args.world_size > 1  # gathered from one size
        if self.tokens_per_batch is None or metrics_of_many or not hasattr(eval_dataset, "__len__"):
            return super()._get_eval_sampler(eval_dataset)
        return TokenBatchSampler(
            row_lengths(eval_dataset),
            self.tokens_per_batch,
            rank=self.args.process_index,
            processes=max(1, self.args.world_size),
        )

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The Trainer's own: whoever asks for predictions tells them apart by the order of the rows."""
        size, sampler = self.args.eval_batch_size, cast(Any, super()._get_eval_sampler)
        return self._get_dataloader(test_dataset, "test", size, sampler)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The Trainer's batches of an optimizer step, padded on the right.

        Raises:
            DataError: one has padding that no mask marks.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        return [as_read(batch, self._reader) for batch in batches], items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's: loss and backward of one batch."""
        with training_step(model, inputs, self.args, self.dropout):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        """The Trainer's count of real tokens, with those of a decoder's side, which it leaves out."""
        sides = [inputs[name].flatten() for name in SIDES if name in inputs]
        super()._track_num_input_tokens({**inputs, "attention_mask": torch.cat(sides)} if sides else inputs)

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
        inputs = as_read(self._prepare_inputs(inputs), self._reader)
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

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The Trainer's, which takes a tied head for missing."""
        super()._issue_warnings_after_load(without_tied(load_result, self.model))


def _as_one(tensors: Sequence[Tensor]) -> Any:
    """As metrics take them: several of a model that finds places, where they start and where they end."""
    return (tensors[0] if len(tensors) == 1 else tuple(tensors)) if tensors else None
