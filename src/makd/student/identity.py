"""Who a student is, and under which names its tensors stand in files.

In memory each stand-in has an `identity`; in a file that has the name of the weight that the architecture's own module
would have there. All other tensors have their names in memory, whatever transformers does to those of the architecture.
"""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, rename_source_key

from makd.anatomy import StandIn

Shapes = Mapping[str, tuple[int, ...]]
"""Of tensors, by name."""
SAMPLE = 1024
"""Numbers of each tensor that an identity is made from: to tell students apart, not to find damage."""


class FileNames(WeightRenaming):
    """Names in a file -> names in memory, for transformers' loading; and back, for its saving."""

    __slots__ = ("names",)

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__("identity", "identity")  # patterns, which are not used
        self.names = dict(names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """The new name, and the old one if there is a new one."""
        found = self.names.get(source_key)
        if found is None:
            return source_key, None
        self._was_used = True
        return found, source_key

    def reverse_transform(self) -> "FileNames":
        """From names in memory to names in a file."""
        return FileNames({memory: file for file, memory in self.names.items()})


def file_names(model: PreTrainedModel) -> FileNames:
    """How the stand-ins' identities are called in a file of `model`."""
    return FileNames(_identity_names(model))


def file_names_of_any_head(model: PreTrainedModel) -> FileNames:
    """How identities are called in a file of `model` under any head: with the base model's prefix, or without."""
    prefix = f"{model.base_model_prefix}."
    exact = _identity_names(model)
    longer = {prefix + file: prefix + memory for file, memory in exact.items()}
    shorter = {file.removeprefix(prefix): memory.removeprefix(prefix) for file, memory in exact.items()}
    return FileNames(longer | shorter | exact)


def names_in_memory(shapes: Shapes, model: PreTrainedModel) -> Shapes:
    """`shapes` by the names that transformers will give the tensors in `model`."""
    state, names = dict(model.state_dict()), file_names_of_any_head(model)
    return {
        rename_source_key(name, [names], [], model.base_model_prefix, state)[0]: shape for name, shape in shapes.items()
    }


def _identity_names(model: PreTrainedModel) -> dict[str, str]:
    """Name in a file -> name in memory, of each identity."""
    return {
        module.name_in_files(name): f"{name}.identity"
        for name, module in model.named_modules()
        if isinstance(module, StandIn)
    }


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of `model` that are saved, by name in memory: tied ones once. They may be empty."""
    state = model.state_dict(keep_vars=True)
    ignored = {*(model._keys_to_ignore_on_save or ()), *(model.all_tied_weights_keys or {})}
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if name not in ignored and id(tensor) not in seen:
            kept[name] = tensor
            seen.add(id(tensor))
    return kept


def make_identity(beginnings: Iterable[tuple[str, tuple[int, ...], Tensor]]) -> str:
    """Sixteen hexadecimal digits that are another student's only by chance.

    Args:
        beginnings: name, shape and at least the first `SAMPLE` numbers of each tensor that is saved.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, shape, tensor in sorted(beginnings, key=lambda item: item[0]):
        if name.endswith(".identity"):
            continue
        sample = tensor.detach().flatten()[:SAMPLE].cpu().contiguous()
        digest.update(f"{name} {shape} {tensor.dtype}".encode())
        digest.update(bytes(sample.view(torch.uint8).tolist()))
    return f"{int.from_bytes(digest.digest(), 'big') >> 1:016x}"


def identity_tensor(identity: str) -> Tensor:
    """What a stand-in of this student keeps."""
    return torch.full_like(StandIn().identity, int(identity, 16))
