"""Station 2: texts and tasks, as batches for calibration, training and evaluation."""

from makd.data.batches import (
    Batch,
    calibration_batches,
    collator,
    count_tokens,
    make_batches,
    reads_blocks,
    row_lengths,
    tokenize,
)
from makd.data.batching import TokenBatchSampler, padding_share, token_batches
from makd.data.guess import check_strings, string_columns
from makd.data.held_out import HELD_OUT_SEED, leave_out, log_prompts_seen, log_rows_seen, split_off
from makd.data.marks import check_room
from makd.data.prompts import completion_of, has_completions, prompt_batch, prompt_of, reference_of
from makd.data.settings import DataConfig, Rendering, Source, no_text, read_settings
from makd.data.sources import (
    Texts,
    hold_out,
    load_splits,
    load_texts,
    rename_columns,
    validation_split,
)
from makd.data.tokenizers import check_student_tokenizer, choose_tokenizer

__all__ = [
    "HELD_OUT_SEED",
    "Batch",
    "DataConfig",
    "Rendering",
    "Source",
    "Texts",
    "TokenBatchSampler",
    "calibration_batches",
    "check_room",
    "check_strings",
    "check_student_tokenizer",
    "choose_tokenizer",
    "collator",
    "completion_of",
    "count_tokens",
    "has_completions",
    "hold_out",
    "leave_out",
    "load_splits",
    "load_texts",
    "log_prompts_seen",
    "log_rows_seen",
    "make_batches",
    "no_text",
    "padding_share",
    "prompt_batch",
    "prompt_of",
    "read_settings",
    "reads_blocks",
    "reference_of",
    "rename_columns",
    "row_lengths",
    "split_off",
    "string_columns",
    "token_batches",
    "tokenize",
    "validation_split",
]
