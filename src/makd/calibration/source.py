"""Station 3: where a walk gets a model's weights: from a model in memory, or from files, a layer at a time.

What walks asks for the weights that it is about to use, and has them inside a `with` block.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Layer
from makd.weights.on_disk import Checkpoint


@runtime_checkable
class LayerSource(Protocol):
    """A model, and its weights when they are asked for."""

    model: PreTrainedModel
    device: torch.device

    def layer(self, layer: Layer) -> AbstractContextManager[None]:
        """Inside the block the parameters of `layer` are there, on `device`."""
        ...

    def frame(self) -> AbstractContextManager[None]:
        """Inside the block everything that is in no layer is there, the head too."""
        ...


class ModelSource:
    """A model in memory, where all weights always are."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`model` is in eval mode."""
        self.model, self.device = model, model.device

    def layer(self, layer: Layer) -> AbstractContextManager[None]:
        """See `LayerSource`."""
        return nullcontext()

    def frame(self) -> AbstractContextManager[None]:
        """See `LayerSource`."""
        return nullcontext()


class FileSource:
    """A model in safetensors files. Of the token embeddings just the rows that a batch asks for are read."""

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy, device: torch.device) -> None:
        """Buffers of the checkpoint's empty model are moved to `device`; parameters come and go."""
        self.checkpoint, self.model, self.anatomy, self.device = checkpoint, checkpoint.model, anatomy, device
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    def layer(self, layer: Layer) -> AbstractContextManager[None]:
        """See `LayerSource`."""
        names = [f"{layer.module}.{name}" for name, _ in self.model.get_submodule(layer.module).named_parameters()]
        return self.checkpoint.filled(names, self.device)

    @contextmanager
    def frame(self) -> Iterator[None]:
        """See `LayerSource`."""
        with self.checkpoint.filled(self._outside(), self.device), self._embedding_rows():
            yield

    def _outside(self) -> list[str]:
        """Parameters that are in no layer, but for the token embeddings; a head that is tied to them is one."""
        apart = (*(f"{layer.module}." for layer in self.anatomy.layers), *self._by_rows())
        names = (name for name, _ in self.model.named_parameters(remove_duplicate=False))
        return [name for name in names if not name.startswith(apart)]

    def _by_rows(self) -> tuple[str, ...]:
        """The matrices of token embeddings, of which rows are read as they are needed."""
        modules = ((name, self.model.get_submodule(name)) for name in self.anatomy.embeddings)
        return tuple(f"{name}.weight" for name, module in modules if isinstance(module, nn.Embedding))

    @contextmanager
    def _embedding_rows(self) -> Iterator[None]:
        """Inside the block the token embeddings have, in each call, just the rows that it asks for."""
        with ExitStack() as stack:
            for weight in self._by_rows():
                module = self.model.get_submodule(weight.removesuffix(".weight"))
                assert isinstance(module, nn.Embedding)
                stack.callback(setattr, module, "weight", module.weight)
                stack.callback(setattr, module, "padding_idx", module.padding_idx)
                module.padding_idx = None  # it is a row of the whole matrix, and matters to gradients only
                hook = module.register_forward_pre_hook(self._read_rows(weight))
                stack.callback(hook.remove)
            yield

    def _read_rows(self, weight: str) -> Callable[..., tuple[Any, ...]]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            needed, places = torch.unique(inputs[0], return_inverse=True)
            rows = self.checkpoint.rows(weight, needed).to(self.device)
            module.weight = nn.Parameter(rows, requires_grad=False)
            return (places, *inputs[1:])

        return hook
