"""Station 2, continued: from texts to token batches, in the form that the model at hand takes.

Encoders read one row at a time, cut at `max_length`; causal language models read blocks of exactly `max_length` tokens,
cut from the joined texts, or a row of each text or conversation; encoder-decoders read a prompt and write its response,
or read a plain text on both sides.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy import predictions_of
from makd.anatomy.sizes import embedding_shape
from makd.anatomy.tokens import IGNORE_INDEX
from makd.anatomy.two_stacks import reads_itself_later
from makd.calibration.counted import CountedBatches
from makd.data.blocks import join_texts, keep_apart
from makd.data.completions import OneText, encode_conversations
from makd.data.conversations import MESSAGES
from makd.data.marks import check_room, given_tokens
from makd.data.settings import Rendering
from makd.data.tokenizers import check_padding_token, check_vocabulary
from makd.data.two_sides import TwoSides, check_writes, decoder_reads
from makd.data.unknown import Known, KnownTokens, check_known
from makd.errors import DataError
from makd.loading import with_padding
from makd.mapped import map_rows
from makd.source_names import name_of

logger = logging.getLogger(__name__)

_CUT = "makd cut"
"""Column of rows that were longer; in the data, since `map` may find its result on disk and not run at all."""
_OWN, _UNKNOWN = "makd own", "makd unknown"
"""Columns of what tokens are, likewise."""

COUNTED = 100_000
"""Rows at most whose tokens are counted to tell frequent ones from rare ones."""

Batch = dict[str, Tensor]
Collator = Callable[[list[Mapping[str, Any]]], Batch]


def reads_blocks(model: PreTrainedModel) -> bool:
    """Whether `model` is a causal language model, which reads joined text in blocks instead of rows."""
    predictions = predictions_of(model)
    return predictions is not None and predictions.label_shift > 0


def tokenize(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    max_length: int,
    seed: int = 0,
    setting: str = "data.max_length",
    rendering: Rendering = Rendering(),  # noqa: B008 - frozen
    cut_level: int = logging.INFO,
) -> Dataset:
    """Rows of `input_ids` (and `attention_mask`, `token_type_ids`, `label`) as `model` reads them, in shuffled order.

    Conversations have `labels` besides, on completions alone; those of an encoder-decoder are a side of their own.

    A text that is null, as csv files hold empty ones, is an empty text. A row without label is left out, and told, if
    it has no token of its own. How much `max_length` cuts off is logged, under the name of its `setting`, at
    `cut_level`: WARNING where nobody has chosen the length.

    Raises:
        DataError: no block of `max_length` tokens can be cut from the texts, the model's positions end before or the
            tokenizer's own tokens leave no room, the rows are pairs and the model reads one text, or conversations and
            it continues none, the tokenizer is not this model's or knows nearly nothing of the texts, or documents are
            to be kept apart that nothing joins.
    """
    _check_apart(rows, model, rendering)
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    tokenizer = copy.deepcopy(tokenizer)  # encoding leaves its truncation in it, and it may be saved with a student
    vocabulary = embedding_shape(model)[0]
    if MESSAGES in rows.column_names:
        _check_continues(model)
        check_room(tokenizer, model, max_length, setting)
        read = (OneText if reads_blocks(model) else TwoSides)(tokenizer, rendering, max_length)
        found = encode_conversations(rows, read, tokenizer, max_length, vocabulary, setting, cut_level)
        return found.shuffle(seed=seed)
    if reads_blocks(model):
        _check_single(columns, model)
    check_room(tokenizer, model, max_length, setting, len(columns))
    if reads_blocks(model):
        if rendering.documents == "apart":
            return keep_apart(rows, tokenizer, max_length, vocabulary, setting).shuffle(seed=seed)
        return join_texts(rows, tokenizer, max_length, vocabulary).shuffle(seed=seed)

    known = KnownTokens(tokenizer)

    def encode(batch: Mapping[str, Any]) -> dict[str, Any]:
        texts = [[text or "" for text in batch[name]] for name in columns]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        check_vocabulary(chain.from_iterable(encoded["input_ids"]), vocabulary)
        counts = [known.count(ids) for ids in encoded["input_ids"]]
        own, unknown = [one.own for one in counts], [one.unknown for one in counts]
        return {**encoded, _CUT: _are_cut(encoded, tokenizer, texts, max_length), _OWN: own, _UNKNOWN: unknown}

    encoded = map_rows(rows, encode, batched=True, remove_columns=columns)
    cut = sum(encoded[_CUT])
    if cut:
        told = (cut, len(encoded), setting, max_length)
        logger.log(cut_level, "%d of %d rows are longer than %s = %d tokens: cut there", *told)
    check_known(Known.sum(zip(encoded[_OWN], encoded[_UNKNOWN], strict=True)), tokenizer)
    return _without_empty(encoded).remove_columns([_CUT, _OWN, _UNKNOWN]).shuffle(seed=seed)


def _without_empty(rows: Dataset) -> Dataset:
    """The rows that have tokens besides the tokenizer's marks: of others all models say the same. Labels are kept."""
    kept = [place for place, own in enumerate(rows[_OWN]) if own]
    if "label" in rows.column_names or len(kept) == len(rows):
        return rows
    if not kept:
        raise DataError(f"The tokenizer has not one token for any of {len(rows):,} texts: it drops all that they hold.")
    told = (len(rows) - len(kept), len(rows))
    logger.warning("%d of %d rows have no token but the tokenizer's marks: left out", *told)
    return rows.select(kept)


def _check_apart(rows: Dataset, model: PreTrainedModel, rendering: Rendering) -> None:
    """Refuse to be told to keep apart what is never joined."""
    if rendering.documents == "joined" or (reads_blocks(model) and MESSAGES not in rows.column_names):
        return
    why = (
        f"{type(model).__name__} reads a row of each text"
        if not reads_blocks(model)
        else "conversations are a row each"
    )
    raise DataError(
        f"data.documents is {rendering.documents}, which is for plain text that a causal language model would read "
        f"joined, and {why} in any case. Leave data.documents out."
    )


def _check_continues(model: PreTrainedModel) -> None:
    if reads_blocks(model):
        return
    if not model.config.is_encoder_decoder:
        raise DataError(
            "The data are prompts with responses, or conversations, which language models answer; "
            f"{type(model).__name__} is none. Name the columns that it is to read with data.text_columns."
        )
    check_writes(model)


def _check_single(columns: list[str], model: PreTrainedModel) -> None:
    if len(columns) > 1:
        raise DataError(
            f"data.text_columns names two columns, and {type(model).__name__} reads one text. Name a prompt and its "
            "answer with data.prompt_columns and data.response_column; join other texts into one column."
        )


def _are_cut(
    encoded: BatchEncoding, tokenizer: PreTrainedTokenizerBase, texts: list[list[str]], length: int
) -> list[bool]:
    if encoded.encodings is not None:
        return [bool(row.overflowing) for row in encoded.encodings]
    full = [place for place, ids in enumerate(encoded["input_ids"]) if len(ids) == length]
    whole = [tokenizer(*(side[place] for side in texts), verbose=False)["input_ids"] for place in full]
    longer = {place for place, ids in zip(full, whole, strict=True) if len(ids) > length}
    return [place in longer for place in range(len(texts[0]))]


def collator(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
    """From tokenized rows to a padded batch, with `labels` where the rows have some or the model predicts its input.

    Of its input, a causal language model does not predict what stands before every text: it is given that in use. Rows
    are padded on the right, whatever the tokenizer does: positions are counted from the left.

    Raises:
        DataError: the model would look for the end of a text at another padding token than the tokenizer's.
        ModelLoadError: the tokenizer has neither a padding nor an end-of-text token.
    """
    tokenizer = with_padding(tokenizer, name_of(model))
    check_padding_token(tokenizer, model)
    blocks, two_stacks, later = reads_blocks(model), bool(model.config.is_encoder_decoder), reads_itself_later(model)
    given = torch.tensor(given_tokens(tokenizer) if blocks else (), dtype=torch.long)
    kinds = ("input_ids", "attention_mask", "token_type_ids")

    def collate(rows: list[Mapping[str, Any]]) -> Batch:
        batch: Batch = dict(
            tokenizer.pad(
                [{name: row[name] for name in kinds if name in row} for row in rows],
                padding=True,
                padding_side="right",
                return_tensors="pt",
            )
        )
        if two_stacks and "labels" in rows[0]:
            return batch | _other_side(rows, model)
        targets = _targets(rows, batch["input_ids"].shape[1])
        if targets:
            batch |= targets
        elif blocks:
            apart = (batch["attention_mask"] == 0) | torch.isin(batch["input_ids"], given)
            batch["labels"] = batch["input_ids"].masked_fill(apart, IGNORE_INDEX)
        if two_stacks:
            batch["decoder_input_ids"] = decoder_reads(model, batch["input_ids"]) if later else batch["input_ids"]
            batch["decoder_attention_mask"] = batch["attention_mask"]
        return batch

    return collate


def _other_side(rows: list[Mapping[str, Any]], model: PreTrainedModel) -> Batch:
    """What a decoder reads and is to predict, in its own length."""
    labels = torch.full((len(rows), max(len(row["labels"]) for row in rows)), IGNORE_INDEX)
    for line, row in zip(labels, rows, strict=True):
        line[: len(row["labels"])] = torch.tensor(row["labels"])
    return {
        "labels": labels,
        "decoder_input_ids": decoder_reads(model, labels),
        "decoder_attention_mask": (labels != IGNORE_INDEX).long(),
    }


def _targets(rows: list[Mapping[str, Any]], width: int) -> Batch:
    """What is to be predicted, as transformers' heads take it: one label a row, one a token, or two places in a row."""
    if "label" in rows[0]:
        return {"labels": torch.tensor([row["label"] for row in rows])}
    if "labels" in rows[0]:
        labels = torch.full((len(rows), width), IGNORE_INDEX)
        for line, row in zip(labels, rows, strict=True):
            line[: len(row["labels"])] = torch.tensor(row["labels"])
        return {"labels": labels}
    if "start_positions" in rows[0]:
        return {name: torch.tensor([row[name] for row in rows]) for name in ("start_positions", "end_positions")}
    return {}


SIDES = ("attention_mask", "decoder_attention_mask")
"""Masks of the real tokens that a batch has."""


def make_batches(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    batch_size: int,
    limit: int | None = None,
    by_length: bool = False,
) -> list[Batch]:
    """The first `limit` tokenized rows as batches on the CPU. `by_length` sorts them, so that little is padding."""
    rows = rows if limit is None or limit >= len(rows) else rows.select(range(limit))
    if by_length:
        lengths = row_lengths(rows)
        rows = rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
    return list(DataLoader(rows, batch_size=batch_size, collate_fn=collator(tokenizer, model)))


def calibration_batches(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, batch_size: int, limit: int
) -> CountedBatches:
    """The first `limit` tokenized rows as batches of like length, which know how often each token stands in all rows.

    Counted are at most `COUNTED` rows, which are in shuffled order.
    """

    def count() -> Tensor:
        counts = np.zeros(0, dtype=np.int64)
        counted = rows.select_columns("input_ids").select(range(min(len(rows), COUNTED)))
        for some in counted.iter(batch_size=1000):
            found = np.bincount(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in some["input_ids"]]))
            longer, shorter = (found, counts) if len(found) > len(counts) else (counts, found)
            longer[: len(shorter)] += shorter
            counts = longer
        return torch.from_numpy(counts)

    return CountedBatches(make_batches(rows, tokenizer, model, batch_size, limit, by_length=True), count)


def count_tokens(batches: Iterable[Batch]) -> int:
    """Real tokens in `batches`, of both sides of an encoder-decoder."""
    return sum(int(batch[name].sum()) for batch in batches for name in SIDES if name in batch)


def row_lengths(rows: Any) -> list[int]:
    """Tokens of each tokenized row, of a `Dataset` or any other sequence of rows; of its longer side, if it has two."""
    if not isinstance(rows, Dataset):
        return [max(len(row["input_ids"]), _count_labels(row.get("labels"))) for row in rows]
    if "labels" not in rows.column_names:
        return [len(row) for row in rows["input_ids"]]
    return [max(len(ids), _count_labels(labels)) for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True)]


def _count_labels(labels: Any) -> int:
    """Of a row's tokens; a row may have one label as a whole."""
    return len(labels) if isinstance(labels, Sequence) else 0
