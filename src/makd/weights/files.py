"""Station 3, streamed: safetensors files read and written a piece at a time.

The library maps whole files into memory, and its writer holds all tensors of a file at once. Here a tensor, or some
rows of it, is read into memory of its own (aligned, and given back when it is not needed), and written likewise.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from makd.errors import ModelLoadError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's name -> torch's dtype. Others (8-bit floats) are of quantized checkpoints, which are not read."""
PIECE = 32 * 2**20
"""Bytes that are read or written at a time where a tensor need not be there whole."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    file: Path
    offset: int
    """Bytes from the beginning of the file."""
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The whole tensor."""
        return self._read(self.shape, 0)

    def rows(self, start: int, stop: int) -> Tensor:
        """Its rows `start` to `stop` (excluded), of a tensor with at least one axis."""
        return self._read((stop - start, *self.shape[1:]), start * self._row_bytes)

    def pieces(self, first: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Its rows, all or from `first` up to `stop`, about `PIECE` bytes at a time."""
        if not self.shape:
            yield self.read()
            return
        stop = self.shape[0] if stop is None else stop
        step = max(1, PIECE // max(1, self._row_bytes))
        for start in range(first, max(stop, first + 1), step):  # one empty piece of an empty tensor
            yield self.rows(start, min(stop, start + step))

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _read(self, shape: tuple[int, ...], skip: int) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype)
        if tensor.numel() == 0:
            return tensor
        with self.file.open("rb") as stream:
            stream.seek(self.offset + skip)
            found = stream.readinto(_bytes_of(tensor))
        if found != tensor.nbytes:
            raise ModelLoadError(f"{self.file} ends before its header says; copy it again, whole.")
        return tensor


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors that a safetensors file holds, by name, and its metadata. No weights are read.

    Raises:
        ModelLoadError: it is not there, no safetensors file, not whole, or holds a dtype that is not in `DTYPES`.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            header = json.loads(stream.read(length)) if 0 < length <= size - 8 else {}
    except FileNotFoundError as error:
        raise ModelLoadError(f"{file} does not exist. Copy the checkpoint again, whole.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} cannot be read as safetensors: {error}. Copy it again.") from error
    if not isinstance(header, dict) or not header:
        raise ModelLoadError(f"{file} is not a safetensors file, or it is not whole. Copy it again.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(_is_entry(entry) for entry in header.values()):
        raise ModelLoadError(f"{file} has a damaged header. Copy it again.")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ModelLoadError(
                f"{file}: {name} is stored as {entry['dtype']}; makd reads {', '.join(DTYPES)}. "
                "Load the unquantized version of the model instead."
            )
        start, stop = entry["data_offsets"]
        tensors[name] = StoredTensor(file, 8 + length + start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if 8 + length + stop > size or stop - start != tensors[name].nbytes:
            raise ModelLoadError(f"{file} is not whole: {name} would end after it. Copy it again.")
    return tensors, metadata


def _is_entry(entry: object) -> bool:
    """Whether this says where a tensor lies."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(number) is int and number >= 0 for number in (*shape, *offsets))


@dataclass(frozen=True)
class Source:
    """A tensor to be written, which need never be in memory whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]
    """Gives its rows, in order, some at a time."""

    @staticmethod
    def of(tensor: Tensor) -> "Source":
        """A tensor in hand."""
        return Source(tensor.dtype, tuple(tensor.shape), lambda: (tensor,))

    @staticmethod
    def stored(tensor: StoredTensor) -> "Source":
        """One that lies in another file."""
        return Source(tensor.dtype, tensor.shape, tensor.pieces)

    def to(self, dtype: torch.dtype) -> "Source":
        """This tensor, its numbers rounded to `dtype` piece by piece."""
        if dtype == self.dtype:
            return self
        return Source(dtype, self.shape, lambda: (piece.to(dtype) for piece in self.pieces()))


def write_tensors(
    path: Path, sources: Mapping[str, Source], metadata: Mapping[str, str] | None = None, *, durable: bool = True
) -> None:
    """Write a safetensors file at `path`; until it is whole it has another name.

    Tensors stand in the order that the library gives them: widest dtype first, then by name.

    Args:
        path: of the file.
        sources: name -> tensor.
        metadata: for the file's header.
        durable: whether it survives a power cut once this returns; what nobody will go on with need not.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    ordered = sorted(sources.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    end = 0
    for name, source in ordered:
        start, end = end, end + math.prod(source.shape) * source.dtype.itemsize
        header[name] = {"dtype": names[source.dtype], "shape": list(source.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor begins at a multiple of 8 bytes
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, source in ordered:
            _write(stream, name, source)
        stream.flush()
        if durable:
            os.fsync(stream.fileno())
    part.replace(path)


def _write(stream: BinaryIO, name: str, source: Source) -> None:
    written = 0
    for piece in source.pieces():
        if piece.dtype != source.dtype:
            raise ValueError(f"{name} was announced as {source.dtype}, and comes as {piece.dtype}.")
        if piece.numel():
            stream.write(_bytes_of(piece.detach().cpu().contiguous()))
        written += piece.numel()
    if written != math.prod(source.shape):
        raise ValueError(f"{name} was announced with shape {source.shape}, and comes with {written} numbers.")


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, not a copy of it."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type] # of python < 3.12's stubs
