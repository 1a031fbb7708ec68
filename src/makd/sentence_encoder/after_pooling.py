"""What stands between pooled vector and embedding in a sentence-transformers folder: Dense, LayerNorm, Normalize.

Weights are read from safetensors only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from makd.errors import ModelLoadError, SettingError
from makd.sentence_encoder.layout import Module, read_described

Step = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Step] = {
    "Tanh": torch.tanh,
    "Identity": lambda vectors: vectors,
    "ReLU": nn.functional.relu,
    "GELU": nn.functional.gelu,
    "SiLU": nn.functional.silu,
    "Sigmoid": torch.sigmoid,
}
"""A Dense module's activation, by the name of torch's class."""


@dataclass(frozen=True)
class AfterPooling:
    """The modules that follow the pooling, frozen. None is the identity."""

    steps: tuple[Step, ...] = ()
    width: int | None = None
    """Of the pooled vectors that they take."""

    def __call__(self, vectors: Float[Tensor, "batch pooled"]) -> Float[Tensor, "batch out"]:
        """The embeddings. Vectors of another width, as of a narrower student, fit no module and stay as they are."""
        if self.width is not None and vectors.shape[-1] != self.width:
            return vectors
        for step in self.steps:
            vectors = step(vectors)
        return vectors


def read_after_pooling(folder: Path, modules: tuple[Module, ...]) -> AfterPooling:
    """The modules after the pooling, but for what no cosine depends on: a Normalize at the end, and Dropout.

    Args:
        folder: of sentence-transformers.
        modules: those that follow the pooling.

    Raises:
        ModelLoadError: their files are missing or damaged.
        SettingError: a module is set to what makd cannot carry out.
    """
    chosen = [module for module in modules if module.kind != "Dropout"]
    while chosen and chosen[-1].kind == "Normalize":
        chosen.pop()
    steps: list[Step] = []
    widths: list[int] = []  # of what goes into the first, between the others, and out of the last
    for module in chosen:
        if module.kind == "Normalize":
            steps.append(lambda vectors: nn.functional.normalize(vectors, dim=-1))
            continue
        step, *ends = (_dense if module.kind == "Dense" else _layer_norm)(folder / module.path)
        if widths and widths[-1] != ends[0]:
            raise SettingError(
                f"{folder / module.path} takes {ends[0]} channels, but the module before it gives {widths[-1]}. Its "
                "files do not belong together."
            )
        steps.append(step)
        widths += ends
    return AfterPooling(tuple(steps), widths[0] if widths else None)


def _dense(folder: Path) -> tuple[Step, int, int]:
    settings, weights = _files(folder)
    name = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = ACTIVATIONS.get(name.rpartition(".")[2]) if name.startswith("torch.nn.") else None
    if activation is None:
        raise SettingError(
            f"{folder / 'config.json'} has the activation {name}; makd knows torch.nn's {', '.join(ACTIVATIONS)}. "
            "Remove modules.json to treat the model as a plain transformer."
        )
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, "sentence_embedding"):
            raise SettingError(
                f"{folder / 'config.json'} has {key} {settings[key]!r}; makd carries out a Dense module of the whole "
                "text's embedding alone. Remove modules.json to treat the model as a plain transformer."
            )
    outer, inner = _take(folder, weights, "linear.weight", 2).shape
    weight = weights["linear.weight"]
    bias = _take(folder, weights, "linear.bias", 1, outer) if settings.get("bias", True) else None
    residual: Tensor | None = None
    if settings.get("use_residual") and inner != outer:
        residual = _take(folder, weights, "residual.weight", 2, outer)

    def apply(vectors: Tensor) -> Tensor:
        out = activation(_linear(vectors, weight, bias))
        if settings.get("use_residual"):
            out = out + (vectors if residual is None else _linear(vectors, residual, None))
        return out

    return apply, inner, outer


def _linear(vectors: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(vectors, weight.to(vectors), None if bias is None else bias.to(vectors))


def _layer_norm(folder: Path) -> tuple[Step, int, int]:
    _, weights = _files(folder)
    weight = _take(folder, weights, "norm.weight", 1)
    bias = _take(folder, weights, "norm.bias", 1, len(weight))

    def apply(vectors: Tensor) -> Tensor:
        return nn.functional.layer_norm(vectors, weight.shape, weight.to(vectors), bias.to(vectors))

    return apply, len(weight), len(weight)


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / "model.safetensors").is_file():
        has_pickle = (folder / "pytorch_model.bin").is_file()
        what = "its weights in a pickle alone, which makd does not open" if has_pickle else "no model.safetensors"
        raise ModelLoadError(
            f"{folder} has {what}. Save the teacher anew with a current sentence-transformers, which writes "
            "safetensors: SentenceTransformer(teacher).save(folder)."
        )
    try:
        weights = load_file(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{folder / 'model.safetensors'} is damaged: {error}. Copy the file anew.") from error
    settings = read_described(folder / "config.json", dict) if (folder / "config.json").is_file() else {}
    return settings, weights


def _take(folder: Path, weights: dict[str, Tensor], name: str, dimensions: int, size: int | None = None) -> Tensor:
    found = weights.get(name)
    if found is None or found.dim() != dimensions or (size is not None and len(found) != size):
        shape = "none" if found is None else str(tuple(found.shape))
        wanted = f"{dimensions} dimensions" + ("" if size is None else f", the first of {size}")
        raise ModelLoadError(
            f"{folder / 'model.safetensors'} has to hold {name} with {wanted}; got {shape} (it has "
            f"{', '.join(weights)}). Copy the file anew."
        )
    return found
