"""Station 7: training batches of so many tokens, of rows of like length, in the place of so many rows."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer

from makd.data import TokenBatchSampler, padding_share, row_lengths, token_batches
from makd.data.batches import SIDES
from makd.distill.arguments import check_stream

_logger = logging.getLogger(__name__)


class BatchingTrainer(Trainer):
    """Transformers' Trainer, which makes its training batches by their tokens where it is told how many."""

    def __init__(self, *args: Any, tokens_per_batch: int | None = None, **kwargs: Any) -> None:
        """Arguments besides this one are `transformers.Trainer`'s.

        Args:
            args: the Trainer's.
            tokens_per_batch: tokens of a training batch on each device, padding counted: see
                `makd.data.token_batches`. None leaves batches to the Trainer.
            kwargs: the Trainer's.

        Raises:
            SettingError: it is given for a stream.
        """
        self.tokens_per_batch = tokens_per_batch
        super().__init__(*args, **kwargs)
        check_stream(tokens_per_batch, self.train_dataset)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.tokens_per_batch is None:
            return super()._get_train_sampler(rows)
        lengths = row_lengths(rows)
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

    def _track_num_input_tokens(self, inputs: Mapping[str, Any]) -> None:
        """The Trainer's count of real tokens, with those of a decoder's side, which it leaves out."""
        sides = [inputs[name].flatten() for name in SIDES if name in inputs]
        super()._track_num_input_tokens({**inputs, "attention_mask": torch.cat(sides)} if sides else inputs)
