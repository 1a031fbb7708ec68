"""Station 3, streamed: a teacher that stays on disk, and an empty model (on `meta`) that is filled part by part."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from makd.errors import ModelLoadError
from makd.weights.files import Source, StoredTensor, read_header
from makd.weights.shards import INDEX, SINGLE, weight_files
from makd.weights.sound import not_finite

OTHER_FORMATS = ("*.gguf", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack")


class Checkpoint:
    """The safetensors files of a model, under the names that the model has for its tensors."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Look at the headers of the files; no weights are read.

        Args:
            folder: with config.json and safetensors files.
            model: of the same architecture, empty; parameters have the dtype that is wanted.

        Raises:
            ModelLoadError: there are no safetensors, a parameter is missing or of another shape, or transformers would
                put it together from several tensors of the file.
        """
        self.model = model
        self.files = _weight_files(folder)
        found: dict[str, StoredTensor] = {}
        for file in self.files:
            found |= read_header(file)[0]
        self.tensors = self._by_names_of_the_model(found)
        self._check(folder)
        self._fill_buffers()

    def read(self, name: str) -> Tensor:
        """The parameter or buffer called `name`, in the dtype that the model has it in."""
        return self.tensors[name].read().to(self._dtype(name))

    def source(self, name: str) -> Source:
        """The parameter or buffer called `name`, to be copied into another file piece by piece."""
        stored, dtype = self.tensors[name], self._dtype(name)
        return Source(dtype, stored.shape, lambda: (piece.to(dtype) for piece in stored.pieces()))

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Rows of a matrix, (indices, columns)."""
        stored = self.tensors[name]
        return torch.cat([stored.rows(index, index + 1) for index in indices.tolist()]).to(self._dtype(name))

    def check_finite(self) -> None:
        """Refuse files that are not finite: all is read once, so that damage is found before hours of work.

        Raises:
            NumericsError: a tensor holds NaN or infinity.
        """
        for name, stored in self.tensors.items():
            for piece in stored.pieces():
                if piece.is_floating_point() and not bool(torch.isfinite(piece.to(self._dtype(name))).all()):
                    raise not_finite(name)

    @contextmanager
    def filled(
        self, names: Iterable[str], device: torch.device, model: PreTrainedModel | None = None
    ) -> Iterator[None]:
        """The parameters `names` have their weights inside the block, and are empty again after it.

        Args:
            names: of parameters.
            device: where they are inside.
            model: a copy of the empty model, to be filled in its place.
        """
        empty: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for name in names:
                owner, _, leaf = name.rpartition(".")
                module = (model or self.model).get_submodule(owner)
                empty.append((module, leaf, module.get_parameter(leaf)))
                setattr(module, leaf, nn.Parameter(self.read(name).to(device), requires_grad=False))
            yield
        finally:
            for module, leaf, parameter in empty:
                setattr(module, leaf, parameter)

    def _dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def _by_names_of_the_model(self, found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """From the file's names to the model's: old ones, and a base model's prefix, as transformers treats them."""
        transforms = get_model_conversion_mapping(self.model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        places: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        places |= dict(self.model.named_buffers(remove_duplicate=False))
        self._places = places
        tensors = {}
        for key, stored in found.items():
            name, converted = rename_source_key(key, renamings, converters, self.model.base_model_prefix, dict(places))
            if converted is not None:
                raise ModelLoadError(
                    f"{stored.file}: transformers puts {name} together from several tensors such as {key!r}, which "
                    "cannot be streamed. Load the model and save it with save_pretrained(save_original_format=False)."
                )
            if name in places:
                tensors[name] = stored
        for name, place in places.items():  # a tied tensor stands in the file under one of its names
            if name not in tensors:
                alias = next((other for other, same in places.items() if same is place and other in tensors), None)
                if alias is not None:
                    tensors[name] = tensors[alias]
        return tensors

    def _fill_buffers(self) -> None:
        """Give the empty model the buffers that are stored. They are small, and its forwards want them everywhere."""
        for name, buffer in [*self.model.named_buffers()]:
            if name in self.tensors:
                module, _, own = name.rpartition(".")
                setattr(self.model.get_submodule(module), own, self.read(name).to(buffer.device))

    def _check(self, folder: Path) -> None:
        missing = [name for name, _ in self.model.named_parameters() if name not in self.tensors]
        if missing:
            raise ModelLoadError(
                f"{folder} has no tensor for {missing[0]} (and {len(missing) - 1} others) of "
                f"{type(self.model).__name__}. The files are not whole, or are of another head: see recipe.head."
            )
        for name, stored in self.tensors.items():
            if stored.shape != tuple(self._places[name].shape):
                raise ModelLoadError(
                    f"{stored.file}: {name} has shape {stored.shape}; its config.json makes it "
                    f"{tuple(self._places[name].shape)}. The files do not belong together."
                )
            if self._places[name].is_floating_point() and not stored.dtype.is_floating_point:
                raise ModelLoadError(
                    f"{stored.file}: {name} is stored as {str(stored.dtype).removeprefix('torch.')}. Weights are "
                    "numbers with a fraction: these are codes of a quantized model, or damaged. Load the unquantized "
                    "version of the model, or copy its folder again, whole."
                )


def _weight_files(folder: Path) -> list[Path]:
    files = weight_files(folder)
    if files and all(file.suffix == ".safetensors" for file in files):
        return files
    others = sorted(path.name for pattern in OTHER_FORMATS for path in folder.glob(pattern))
    if others:
        raise ModelLoadError(
            f"{folder} holds {others[0]} and no safetensors; only those can be streamed. Convert it: load the model "
            "once on a machine that it fits into, and save it with save_pretrained."
        )
    raise ModelLoadError(f"{folder} holds no weights ({SINGLE} or {INDEX}). Give a folder with a whole checkpoint.")
