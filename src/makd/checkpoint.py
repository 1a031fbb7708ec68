"""From a checkpoint's files to what they say: config, dtype; and whether a loaded model is all from them.

Stands below `loading`. transformers fills what it does not find at random and leaves out what it has no place for, both
with a warning: here that is an error, unless nothing that is used is touched by it.
"""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from makd.anatomy.stand_in import NUMBER
from makd.anatomy.table import ANATOMIES
from makd.errors import MakdError, ModelLoadError
from makd.weights.shards import read_object, stored_tensors

OLD_BUFFERS = re.compile(r"(rotary_emb\..*|position_ids|masked_bias|attn\.bias|attention\.bias)$")
"""Tensors inside layers that old versions of transformers saved and newer ones compute."""
SHOWN = 3
"""Names in an error text."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever a library says about files that it cannot read is a `ModelLoadError`; `what` says what was tried."""
    try:
        yield
    except (MakdError, MemoryError):
        raise
    except Exception as error:  # a config with wrong types fails anywhere, with any type
        raise ModelLoadError(f"{what}: {first_lines(error)}") from error


@contextmanager
def without_report() -> Iterator[None]:
    """Inside the block transformers does not print which weights it did not find or use: makd judges them itself."""

    def is_other(record: logging.LogRecord) -> bool:
        return " LOAD REPORT" not in str(record.msg)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def first_lines(error: BaseException) -> str:
    """The part of a library's error text that a person needs."""
    text = " ".join(str(error).split("\n\n")[0].split())[:400]
    known = isinstance(error, OSError | ValueError | RuntimeError | ImportError)
    return text if known and text else f"{type(error).__name__}{': ' if text else ''}{text}"


def read_config(folder: str) -> PretrainedConfig:
    """The config of a checkpoint: a folder, or a hub id.

    Raises:
        ModelLoadError: there is none, it is no JSON object, or a value is of a type that its model does not take, or
            counts what no model has.
    """
    file = Path(folder) / "config.json"
    if file.is_file():
        ANATOMIES.get(
            str(read_object(file).get("model_type"))
        )  # a user's package may tell transformers of its own models
    where = ": its config.json cannot be read as a model's" if file.is_file() else ""
    with refusing(f"No model could be loaded from {folder!r}{where}"):
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    named = config.architectures
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise ModelLoadError(f"{folder}: `architectures` in config.json is a list of class names; it is {named!r}.")
    text = config.get_text_config()
    for name, most in _COUNTS.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and not 0 <= value <= most:
            raise ModelLoadError(
                f"{folder}: `{name}` in config.json is {value:,}; a model has 0 to {most:,}. It was changed or damaged."
            )
    return config


_COUNTS = {"num_hidden_layers": 10_000, "num_attention_heads": 1_000_000, "hidden_size": 100_000_000}
"""What a config counts, and far more than any model has: building one of more would not end."""


def check_padding(config: PretrainedConfig, name: str) -> None:
    """Refuse a config whose padding token has no embedding.

    Raises:
        ModelLoadError: the padding token is beyond the vocabulary.
    """
    text = config.get_text_config()
    padding, vocabulary = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(padding, int) and isinstance(vocabulary, int) and padding >= vocabulary:
        raise ModelLoadError(
            f"The config.json of {name} has pad_token_id {padding}, but embeddings for {vocabulary:,} tokens, from 0. "
            "Set it to a token of the vocabulary, or to null."
        )


def stored_dtype(folder: str) -> torch.dtype | None:
    """The dtype that most weights of a checkpoint in a local folder are stored in; None where its files do not tell."""
    where = Path(folder)
    if not where.is_dir():
        return None
    numbers: Counter[torch.dtype] = Counter()
    for _, tensor in stored_tensors(where):
        if tensor.dtype.is_floating_point:
            numbers[tensor.dtype] += tensor.nbytes // tensor.dtype.itemsize
    if numbers:
        return numbers.most_common(1)[0][0]
    named = getattr(read_config(folder), "dtype", None)
    return named if isinstance(named, torch.dtype) else None


def check_numbers(folder: Path, model: PreTrainedModel, name: str) -> None:
    """Refuse weights in a local folder that are stored as codes: transformers takes whole numbers, too, as they are.

    Args:
        folder: of the checkpoint; what is no folder with safetensors is not looked at.
        model: as loaded.
        name: of the checkpoint.

    Raises:
        ModelLoadError: a parameter is made of whole numbers: codes without the config that explains them, or damage.
    """
    parameters: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    for key, tensor in stored_tensors(folder):
        if tensor.dtype.is_floating_point or tensor.shape == NUMBER:  # that of a student's identity
            continue
        known, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if {key, known} & parameters.keys():
            raise ModelLoadError(
                f"{name}: {key} is stored as {str(tensor.dtype).removeprefix('torch.')}. Weights are numbers with a "
                "fraction: these are codes of a quantized model, or damaged. Load the unquantized version of the "
                "model, or copy its folder again, whole."
            )


def check_complete(model: PreTrainedModel, found: Mapping[str, Any], name: str) -> None:
    """Refuse a `model` of which some weight did not come from its files.

    What only makes a pooler need not be there in a model without a head: nothing here reads it.

    Args:
        model: as loaded.
        found: what `from_pretrained(..., output_loading_info=True)` tells.
        name: of the checkpoint.

    Raises:
        ModelLoadError: weights are missing, of other shapes, or stand in the files without a place in the model's
            layers.
    """
    missing = {*found["missing_keys"]}
    if model.base_model is model:
        missing = {key for key in missing if not _is_of_pooler(key)}
    _refuse_filled(model, found, {*missing, *_reshaped(found)}, name)
    _refuse_left_out(model, found, name)


def check_complete_below_head(model: PreTrainedModel, found: Mapping[str, Any], name: str) -> None:
    """Refuse a `model` of which a weight below its head did not come from its files; the head is to be taught.

    Arguments and errors are those of `check_complete`; the pooler belongs to the head, but none has another shape.
    """
    filled = {*(key for key in found["missing_keys"] if not _is_of_pooler(key)), *_reshaped(found)}
    below = {key for key in filled if key.startswith(f"{model.base_model_prefix}.")}
    _refuse_filled(model, found, below, name)
    _refuse_left_out(model, found, name)


def _refuse_filled(model: PreTrainedModel, found: Mapping[str, Any], filled: Collection[str], name: str) -> None:
    if not filled:
        return
    cls, shapes = type(model).__name__, _reshaped(found)
    odd = next((key for key in sorted(filled) if key in shapes), None)
    if odd is not None:
        theirs, ours = shapes[odd]
        raise ModelLoadError(
            f"No model could be loaded from {name!r}: {odd} has shape {theirs} in its files, and its config.json makes "
            f"it {ours} ({len(filled)} weights do not fit). The files do not belong together: copy the checkpoint "
            "again, whole."
        )
    prefix = f"{model.base_model_prefix}."
    head_alone = model.base_model is not model and not any(key.startswith(prefix) for key in filled)
    advice = (
        f"The checkpoint has no such head: take one that it has (recipe.head auto takes its own), or teach one first, "
        f"with `makd finetune {name}`."
        if head_alone
        else "Its files are not whole, are another model's, or name their tensors otherwise: copy the checkpoint "
        "again, with its config.json and weights at once."
    )
    strangers = found["unexpected_keys"]
    has = f" It holds {_some(strangers)}, which have no place there." if strangers else ""
    raise ModelLoadError(f"{name} lacks weights of a {cls}: {_some(filled)}. They would be random.{has} {advice}")


def _refuse_left_out(model: PreTrainedModel, found: Mapping[str, Any], name: str) -> None:
    """Weights inside a layer, or of a layer, that the model does not have: its config is of another model."""
    modules = dict(model.named_modules())
    buffers = {key for key, _ in model.named_buffers()}
    prefix = f"{model.base_model_prefix}."
    inside = [
        key
        for key in found["unexpected_keys"]
        if not OLD_BUFFERS.search(key)
        and not {key, prefix + key, key.removeprefix(prefix)} & buffers
        and any(_is_in_layers(place, modules) for place in (key, prefix + key, key.removeprefix(prefix)))
    ]
    if inside:
        raise ModelLoadError(
            f"{name} holds weights of layers that its config.json does not make: {_some(inside)}. They would be left "
            f"out of the {type(model).__name__}. The files do not belong together: copy the checkpoint again, with "
            "its config.json and weights at once."
        )


def _is_of_pooler(key: str) -> bool:
    return "pooler" in key.split(".")


def _is_in_layers(key: str, modules: Mapping[str, nn.Module]) -> bool:
    parts = key.split(".")
    return any(isinstance(modules.get(".".join(parts[:end])), nn.ModuleList) for end in range(1, len(parts)))


def _reshaped(found: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Name -> its shape in the files and in the model, of weights where they differ."""
    return {key: (tuple(theirs), tuple(ours)) for key, theirs, ours in found["mismatched_keys"]}


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} others"
