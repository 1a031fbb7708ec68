"""Station 2: texts and tasks, as batches for calibration, training and evaluation."""

from makd.data.batches import Batch, collator, count_tokens, make_batches, reads_blocks, row_lengths, tokenize
from makd.data.batching import TokenBatchSampler, padding_share, token_batches
from makd.data.sources import (
    DataConfig,
    Texts,
    check_strings,
    count_held_out,
    hold_out,
    load_splits,
    load_texts,
    rename_columns,
    string_columns,
    validation_split,
)

__all__ = [
    "Batch",
    "DataConfig",
    "Texts",
    "TokenBatchSampler",
    "check_strings",
    "collator",
    "count_held_out",
    "count_tokens",
    "hold_out",
    "load_splits",
    "load_texts",
    "make_batches",
    "padding_share",
    "reads_blocks",
    "rename_columns",
    "row_lengths",
    "string_columns",
    "token_batches",
    "tokenize",
    "validation_split",
]
