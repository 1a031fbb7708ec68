"""Station 7: training batches of so many tokens, of rows of like length, in the place of so many rows."""

import logging
from typing import Any

from datasets import Dataset
from transformers import Trainer

from makd.aspects import Completions
from makd.data import TokenBatchSampler, padding_share, row_lengths, token_batches
from makd.data.prompts import written_lengths
from makd.distill.arguments import check_stream

_logger = logging.getLogger(__name__)


def training_lengths(rows: Any, completions: Completions, limit: int | None) -> list[int]:
    """Tokens of each row of a training, by which batches are made: at most, where completions are written.

    Args:
        rows: to train on.
        completions: who writes them.
        limit: tokens that a row of the models may have.

    Raises:
        DataError: completions are written, and a row holds none in whose place they could stand.
    """
    if not completions.written or not _have_labels(rows):  # which is refused elsewhere
        return row_lengths(rows)
    return written_lengths(rows, completions.max_new_tokens, limit)


def _have_labels(rows: Any) -> bool:
    if isinstance(rows, Dataset):
        return "labels" in rows.column_names
    return all("labels" in row for row in rows)


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
