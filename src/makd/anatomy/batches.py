"""Station 1: whether what is handed over as batches is inputs of a model, before the model reads it.

A model answers a wrong batch with an IndexError of a kernel's, far away from who made it; or not at all, and wrong.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy.limits import position_limit, token_limit
from makd.anatomy.padding import check_marked, padded_right
from makd.anatomy.sizes import embedding_shape
from makd.errors import DataError
from makd.kinds import shown

IDS = ("input_ids", "decoder_input_ids")
MASKS = {"attention_mask": "input_ids", "token_type_ids": "input_ids", "decoder_attention_mask": "decoder_input_ids"}
"""What has a number for each token -> the tokens."""
ADVICE = "Give a list of what `tokenizer(texts, padding=True, return_tensors='pt')` gives, or a DataLoader."
WITHOUT = "Leave it out: a batch holds what the model reads, and labels."


def check_batches(batches: Iterable[Mapping[str, Tensor]], model: PreTrainedModel) -> Iterator[Mapping[str, Tensor]]:
    """Refuse batches that `model` cannot read; gives them on, each one looked at when it is asked for.

    What is given on is padded on the right, and without what was None. It is no tensor of `torch.inference_mode`, of
    which embeddings have no gradients.

    Args:
        batches: model inputs, as a DataLoader gives them.
        model: that will read them.

    Raises:
        DataError: one is no dict of tensors, has ids that the model has no embeddings for, more tokens in a row than
            the model has positions for, or padding that no mask marks.
    """
    vocabulary = embedding_shape(model)[0]
    limit = token_limit(model)
    for given in batches:
        batch = _tensors(given)
        _check(batch, vocabulary)
        if limit is not None:
            _check_length(batch, model, limit)
        check_marked(batch, model)
        yield padded_right(batch, model)


def model_inputs(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What a model reads of a batch, on `device`: all but the labels."""
    return {name: value.to(device) for name, value in batch.items() if name != "labels"}


def _tensors(batch: Any) -> dict[str, Tensor]:
    """What a batch holds.

    Raises:
        DataError: it is no mapping, has no ids, or something in it is no tensor.
    """
    if not isinstance(batch, Mapping):
        raise DataError(f"A batch is a dict of tensors, with input_ids in it; got {shown(batch)}. {ADVICE}")
    found = {name: value for name, value in batch.items() if value is not None}
    if "input_ids" not in found:
        raise DataError(f"A batch needs `input_ids`; this one has {', '.join(map(repr, found)) or 'nothing'}. {ADVICE}")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise DataError(
                f"{name} of a batch is a tensor; got {shown(value)}. {ADVICE if name in (*IDS, *MASKS) else WITHOUT}"
            )
    return {name: value.clone() if value.is_inference() else value for name, value in found.items()}


def _check(batch: Mapping[str, Tensor], vocabulary: int) -> None:
    for name in IDS:
        if name in batch:
            _check_ids(name, batch[name], vocabulary)
    for name, tokens in MASKS.items():
        mask, ids = batch.get(name), batch.get(tokens)
        if mask is not None and ids is not None and mask.dim() == 2 and mask.shape != ids.shape:
            raise DataError(
                f"{name} of a batch has a number for each of {tokens}, which are {tuple(ids.shape)}; got "
                f"{tuple(mask.shape)}."
            )


def _check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2 or ids.numel() == 0:
        raise DataError(
            f"{name} of a batch are whole numbers (int64), rows x tokens, at least one; got "
            f"{str(ids.dtype).removeprefix('torch.')} of shape {tuple(ids.shape)}."
        )
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocabulary:
        raise DataError(
            f"The batch holds token {lowest if lowest < 0 else highest}, but the model has embeddings for "
            f"{vocabulary:,} tokens, from 0. Give the tokenizer that this model was trained with."
        )


def _check_length(batch: Mapping[str, Tensor], model: PreTrainedModel, tokens: int) -> None:
    """Refuse rows of more than `tokens` tokens; packed texts may be longer, each has positions from 0.

    Raises:
        DataError: a row is longer, or a position lies beyond those that the model has.
    """
    called, positions, limit = type(model).__name__, batch.get("position_ids"), position_limit(model)
    last = int(positions.max()) if positions is not None and positions.numel() > 0 else None
    packed = last is not None
    if last is not None and limit is not None and last >= limit:
        raise DataError(f"A batch has position {last}, from 0, but {called} has {limit}. Cut its texts.")
    for name in IDS:
        told = packed and name == "input_ids"
        if name in batch and not told and batch[name].shape[1] > tokens:
            raise DataError(
                f"{name} of a batch have {batch[name].shape[1]} tokens a row, but {called} has positions for {tokens}. "
                f"Tokenize with truncation=True, max_length={tokens}."
            )
