"""Station 2, continued: from texts to token batches, in the form that the model at hand takes.

Encoders read one row at a time, cut at `max_length`; causal language models read blocks of exactly `max_length` tokens,
cut from the joined texts; encoder-decoders read a row on both sides.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.errors import DataError

Batch = dict[str, Tensor]
Collator = Callable[[list[Mapping[str, Any]]], Batch]


def reads_blocks(model: PreTrainedModel) -> bool:
    """Whether `model` is a causal language model, which reads joined text in blocks instead of rows."""
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def tokenize(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int, seed: int = 0
) -> Dataset:
    """Rows of `input_ids` (and `attention_mask`, `token_type_ids`, `label`) as `model` reads them, in shuffled order.

    A text that is null, as csv files hold empty ones, is an empty text.

    Raises:
        DataError: no block of `max_length` tokens can be cut from the texts, the model's positions end before, or the
            tokenizer is not this model's.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < max_length:
        raise DataError(
            f"data.max_length is {max_length} tokens, but {type(model).__name__} has positions for {limit}; lower it."
        )
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    if reads_blocks(model):
        return _blocks(rows, tokenizer, max_length, vocabulary).shuffle(seed=seed)
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    tokenizer = copy.deepcopy(tokenizer)  # encoding leaves its truncation in it, and it may be saved with a student

    def encode(batch: Mapping[str, Any]) -> dict[str, Any]:
        texts = [[text or "" for text in batch[name]] for name in columns]
        encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        _check_vocabulary(chain.from_iterable(encoded["input_ids"]), vocabulary)
        return encoded

    return rows.map(encode, batched=True, remove_columns=columns).shuffle(seed=seed)


def collator(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Collator:
    """From tokenized rows to a padded batch, with `labels` where the rows have some or the model predicts its input."""
    blocks, two_stacks = reads_blocks(model), bool(model.config.is_encoder_decoder)
    kinds = ("input_ids", "attention_mask", "token_type_ids")

    def collate(rows: list[Mapping[str, Any]]) -> Batch:
        batch: Batch = dict(
            tokenizer.pad(
                [{name: row[name] for name in kinds if name in row} for row in rows],
                padding=True,
                return_tensors="pt",
            )
        )
        targets = _targets(rows, batch["input_ids"].shape[1], tokenizer.padding_side)
        if targets:
            batch |= targets
        elif blocks:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if two_stacks:
            batch["decoder_input_ids"] = batch["input_ids"]
            batch["decoder_attention_mask"] = batch["attention_mask"]
        return batch

    return collate


def _targets(rows: list[Mapping[str, Any]], width: int, padding_side: str) -> Batch:
    """What is to be predicted, as transformers' heads take it: one label a row, one a token, or two places in a row."""
    if "label" in rows[0]:
        return {"labels": torch.tensor([row["label"] for row in rows])}
    if "labels" in rows[0]:
        labels = torch.full((len(rows), width), -100)
        for line, row in zip(labels, rows, strict=True):
            place = line[width - len(row["labels"]) :] if padding_side == "left" else line[: len(row["labels"])]
            place.copy_(torch.tensor(row["labels"]))
        return {"labels": labels}
    if "start_positions" in rows[0]:
        return {name: torch.tensor([row[name] for row in rows]) for name in ("start_positions", "end_positions")}
    return {}


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


def count_tokens(batches: list[Batch]) -> int:
    """Real tokens in `batches`."""
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def row_lengths(rows: Any) -> list[int]:
    """Tokens of each tokenized row, of a `Dataset` or any other sequence of rows."""
    ids = rows["input_ids"] if isinstance(rows, Dataset) else (row["input_ids"] for row in rows)
    return [len(row) for row in ids]


def _check_vocabulary(ids: Iterable[int], vocabulary: int) -> None:
    highest = max(ids, default=0)
    if highest >= vocabulary:
        raise DataError(
            f"The tokenizer gives token {highest}, but the model has embeddings for {vocabulary:,} tokens, from 0. "
            "Give the tokenizer that this model was trained with."
        )


def _blocks(rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, vocabulary: int) -> Dataset:
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in rows["text"]:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if end is not None:
            ids.append(end)
    _check_vocabulary(ids, vocabulary)
    count = len(ids) // length
    if count == 0:
        raise DataError(
            f"The text has {len(ids)} tokens, fewer than one block of data.max_length = {length}; "
            "give more text or shorter blocks."
        )
    return Dataset.from_dict(
        {
            "input_ids": [ids[start * length : (start + 1) * length] for start in range(count)],
            "attention_mask": [[1] * length] * count,
        }
    )
