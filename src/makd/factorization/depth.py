"""Station 3: which layers a student can do without: those whose absence changes the model's outputs least, measured."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, SkippedLayer
from makd.errors import UnsupportedModelError
from makd.factorization.drift import distance, outputs_of


@dataclass(frozen=True)
class Drop:
    """A layer that is dropped, after those before it were."""

    layer: str
    """Its module."""
    drift: float
    """How far the outputs are from the teacher's, with it and all before it gone: `drift.distance`."""


def droppable_layers(model: PreTrainedModel, anatomy: Anatomy) -> tuple[list[str], str | None]:
    """Layers that may be dropped, in forward order; and why not more, where there is a reason besides.

    The first layer of each kind of attention stays: key-value caches count the tokens that they have seen by it.
    """
    if anatomy.is_encoder_decoder:
        return [], "layers of an encoder-decoder share position biases and cross-attention"
    if any(layer.call > 0 for layer in anatomy.layers):
        return [], "its layers share one set of weights, so dropping some saves nothing"
    if "hidden" in anatomy.off:
        return [], anatomy.off["hidden"]
    kinds = getattr(model.config, "layer_types", None) or [""] * len(anatomy.layers)
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    return [layer.module for layer in anatomy.layers if layer.index not in first.values()], None


@contextmanager
def skipping(model: PreTrainedModel, layers: Iterable[str], outputs: int = 0) -> Iterator[None]:
    """Inside the block, `model` does without these layers; after it, it has them again.

    Args:
        model: changed meanwhile.
        layers: their modules' names.
        outputs: what a layer returns, as `SkippedLayer` takes it.
    """
    kept: dict[str, nn.Module] = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in kept.items():
            model.set_submodule(name, SkippedLayer.in_place_of(layer, outputs))
        yield
    finally:
        for name, layer in kept.items():
            model.set_submodule(name, layer)


def layer_outputs(model: PreTrainedModel, anatomy: Anatomy, batch: Mapping[str, Tensor]) -> int:
    """What the model's layers return: 0 for hidden states alone, else the length of a tuple."""
    found: list[int] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found.append(len(output) if isinstance(output, tuple | list) else 0)

    handle = model.get_submodule(anatomy.layers[0].module).register_forward_hook(note)
    try:
        outputs_of(model, batch)
    finally:
        handle.remove()
    return found[0]


def _check_runs(model: PreTrainedModel, layers: Sequence[str], batch: Mapping[str, Tensor], outputs: int) -> None:
    """Refuse models whose own code looks for parts of its layers, which a layer that does nothing does not have."""
    try:
        with skipping(model, layers, outputs):
            outputs_of(model, batch)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run without {layers[0]} and those after it: {error}. Its layers cannot "
            "be dropped: set factorize.depth to all."
        ) from error


def greedy_drops(
    model: PreTrainedModel,
    anatomy: Anatomy,
    layers: Sequence[str],
    batches: Sequence[Mapping[str, Tensor]],
    outputs: int = 0,
) -> Iterator[Drop]:
    """Layers in the order in which to drop them: next is always the one without which the outputs drift least.

    Every step measures each of the layers that are left, with those before it gone: layers that repeat one another are
    cheap one by one and dear together.

    Args:
        model: in eval mode; it has all its layers again whenever a drop is handed out.
        anatomy: of `model`, with all its layers.
        layers: that may be dropped.
        batches: that drift is measured on.
        outputs: what a layer returns, as `SkippedLayer` takes it.

    Raises:
        UnsupportedModelError: the model does not run without them.
    """
    _check_runs(model, layers, batches[0], outputs)
    gone: list[str] = []
    while len(gone) < len(layers):
        sums, count = dict.fromkeys((name for name in layers if name not in gone), 0.0), 0
        for batch in batches:
            reference = outputs_of(model, batch)
            for name in sums:
                with skipping(model, [*gone, name], outputs):
                    total, number = distance(anatomy, batch, reference, outputs_of(model, batch))
                sums[name] += total
            count += number
        best = min(sums, key=lambda name: sums[name])
        gone.append(best)
        yield Drop(best, sums[best] / count)
