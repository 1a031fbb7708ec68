"""Station 3: which files a folder keeps a model's weights in; an index of shards is believed only inside its folder."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from makd.errors import ModelLoadError
from makd.plain_json import read_json
from makd.weights.files import StoredTensor, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
"""What is read where there are no safetensors: by transformers, never by makd."""


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights in `folder` from; none if it knows none there.

    Raises:
        ModelLoadError: an index of shards is no index, or names a file that is elsewhere or not there.
    """
    for single in (SINGLE, PICKLED):
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            return _shards(index)
    return []


def stored_tensors(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    """(name, where it lies) of each tensor of the weights in `folder`; nothing of those that are no safetensors.

    Raises:
        ModelLoadError: as of `weight_files`, or a file is damaged.
    """
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            yield from read_header(file)[0].items()


def read_object(file: Path) -> dict[str, Any]:
    """What a JSON file says, which is an object, as configs and indexes are.

    Raises:
        ModelLoadError: it is no JSON, or something else.
    """
    content: dict[str, Any] = read_json(file, dict, ModelLoadError, "Copy it again.")
    return content


def _shards(index: Path) -> list[Path]:
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise ModelLoadError(
            f"No model could be loaded from {str(index.parent)!r}: {index.name} says under `weight_map` which file "
            "holds each tensor; this one does not. Copy it again."
        )
    files = sorted(set(names.values()))
    for name in files:
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or "\\" in name or ":" in name:
            raise ModelLoadError(f"{index} names {name!r}, which is outside its folder; a checkpoint is one folder.")
        if not (index.parent / name).is_file():
            raise ModelLoadError(f"{index} names {name}, which does not exist. Copy the checkpoint again, whole.")
    return [index.parent / name for name in files]
