"""From the first process of a run to the others: anything, models too, bit for bit.

A value is taken apart into its structure, which is pickled, and its tensors, whose bytes are sent as they are: no model
stands in memory twice. What shares a tensor (tied embeddings) shares it again on the other side.
"""

import io
import pickle
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from makd.errors import LostProcessError
from makd.processes import started
from makd.random_state import read_host_states, set_host_states

_LONGEST_PAUSE = 0.1
"""Seconds between two looks at whether something has come."""


def send(value: Any) -> None:
    """Send `value` to all others, and the state of the random numbers: what follows draws the same everywhere."""
    tensors: list[Tensor] = []
    structure = io.BytesIO()
    _Pickler(structure, tensors).dump((value, _random_states()))
    content = torch.frombuffer(structure.getbuffer(), dtype=torch.uint8).clone()
    _exchange(torch.tensor([content.numel()]))
    _exchange(content)
    for tensor in tensors:
        if tensor.device.type != "meta":
            _exchange(_bytes_of(tensor.detach().cpu()))


def receive() -> Any:
    """What the first process sends."""
    size = torch.zeros(1, dtype=torch.long)
    _exchange(size)
    content = torch.empty(int(size), dtype=torch.uint8)
    _exchange(content)
    tensors: list[Tensor] = []
    value, states = _Unpickler(io.BytesIO(content.numpy().tobytes()), tensors).load()
    for tensor in tensors:
        if tensor.device.type != "meta":
            is_in_place = tensor.device.type == "cpu" and tensor.is_contiguous()
            raw = tensor.detach() if is_in_place else torch.empty(tensor.shape, dtype=tensor.dtype)
            _exchange(_bytes_of(raw))
            if not is_in_place:
                with torch.no_grad():
                    tensor.copy_(raw)
    _take_random_states(states)
    return value


def barrier() -> None:
    """Wait until all processes are here."""
    _wait(lambda: dist.barrier(started.group(), async_op=True))


class _Pickler(pickle.Pickler):
    """Writes a tensor as a description of it, and keeps the tensor itself for later."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors
        self._places: dict[int, int] = {}

    def reducer_override(self, value: Any) -> Any:
        """What pickle does not know by itself."""
        return (MappingProxyType, (dict(value),)) if isinstance(value, MappingProxyType) else NotImplemented

    def persistent_id(self, value: Any) -> Any:
        """Its place among the tensors, and what it is."""
        if not isinstance(value, Tensor):
            return None
        place = self._places.get(id(value))
        if place is None:
            place = self._places[id(value)] = len(self.tensors)
            self.tensors.append(value)
        is_parameter, stride = isinstance(value, nn.Parameter), _dense_stride(value)
        return place, is_parameter, value.requires_grad, tuple(value.shape), stride, value.dtype, value.device.type


class _Unpickler(pickle.Unpickler):
    """Reads descriptions as empty tensors, which are filled later."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, description: Any) -> Tensor:
        """The empty tensor; the same one where it was the same."""
        place, is_parameter, learns, shape, stride, dtype, device = description
        if place == len(self.tensors):
            made = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            self.tensors.append(nn.Parameter(made, learns) if is_parameter else made.requires_grad_(learns))
        return self.tensors[int(place)]


def _dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """Its own where it lies in one piece, perhaps transposed: products round by it; else that of a copy."""
    size = 1
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1 and stride != size:
            return torch.empty(tensor.shape, device="meta").stride()
        size *= length
    return tensor.stride()


def _bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's memory as bytes, where it is in one piece; else a copy of it."""
    return tensor.reshape(-1).view(torch.uint8)


def _exchange(content: Tensor) -> None:
    """From the first process into the memory of the others."""
    if content.numel():
        _wait(lambda: dist.broadcast(content, 0, group=started.group(), async_op=True))


def _wait(begin: Callable[[], Any]) -> None:
    """Begin something with all processes and wait for its end. A signal ends the wait: Python sees none inside gloo.

    Raises:
        LostProcessError: another process is not there any more.
    """
    try:
        work = begin()
        pause = 0.0005
        while not work.is_completed():
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)
        work.wait()
    except RuntimeError as error:
        raise LostProcessError(f"Another process of this run is gone: {error}") from error


def _random_states() -> Mapping[str, Any]:
    states = read_host_states()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _take_random_states(states: Mapping[str, Any]) -> None:
    set_host_states(states)
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
