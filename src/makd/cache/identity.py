"""Station 6: what a cache is of, as hashes, so that one of another teacher or other data is not used by mistake.

Hashes are of weights and token ids themselves, not of what a forward gives: they are the same on every machine, with
every number of threads.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.provenance import extensions_of

_NOT_OF_THE_TEACHER = ("label", "labels", "row", "length")
"""Columns that do not change what a teacher says."""
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
"""Entries of a config that say nothing about what the model computes (the weights have their dtypes)."""


def identify(
    teacher: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]] | Dataset,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """What a cache is compared by. What is not given is left out."""
    known: dict[str, Any] = {
        "teacher": hash_teacher(teacher),
        "data": hash_rows(rows, with_labels=bool(teacher.config.is_encoder_decoder)),
        "rows": len(rows),
    }
    known |= extensions_of({"model_type": teacher.config.model_type})
    if tokenizer is not None:
        known["tokenizer"] = hash_tokenizer(tokenizer)
    if max_length is not None:
        known["max_length"] = max_length
    return known


def hash_teacher(model: PreTrainedModel) -> str:
    """SHA-256 of the class, the config and all weights and buffers."""
    found = hashlib.sha256(type(model).__name__.encode())
    config = {name: value for name, value in model.config.to_dict().items() if name not in _NOT_OF_THE_MODEL}
    found.update(json.dumps(config, sort_keys=True, default=str).encode())
    _take_weights(found, model)
    return found.hexdigest()


def hash_weights(model: PreTrainedModel) -> str:
    """SHA-256 of all weights and buffers, by name: the same on every machine, whatever versions read them."""
    found = hashlib.sha256()
    _take_weights(found, model)
    return found.hexdigest()


def _take_weights(found: "hashlib._Hash", model: PreTrainedModel) -> None:
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(_bytes(tensor))


def hash_rows(rows: Sequence[Mapping[str, Any]] | Dataset, with_labels: bool = False) -> str:
    """SHA-256 of the token ids of every row in their order, and of what else the teacher reads.

    Labels count only `with_labels`: an encoder-decoder may make its decoder's input from them.
    """
    found = hashlib.sha256()
    for row in _each(rows):
        for name in sorted(row):
            if name in _NOT_OF_THE_TEACHER and not (with_labels and name == "labels"):
                continue
            value = row[name]
            if isinstance(value, str):
                continue
            ids = np.asarray(value, dtype=np.int64)
            found.update(f"{name} {ids.shape}".encode())
            found.update(ids.tobytes())
    return found.hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary and the special tokens. What a tokenizer does with them shows in the rows."""
    content = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _each(rows: Sequence[Mapping[str, Any]] | Dataset) -> Iterable[Mapping[str, Any]]:
    return rows if isinstance(rows, Dataset) else (rows[index] for index in range(len(rows)))


def _bytes(tensor: Tensor) -> Any:
    """A buffer, not a copy."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
