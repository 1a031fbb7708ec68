"""A model without the layers that a student skips: the same computation, in an architecture with fewer layers."""

import copy
import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from makd.anatomy import SkippedLayer
from makd.errors import ExportError

OF_LAYERS = re.compile("layer|block")
"""In the names of config entries that are lists over layers. Ids of tokens, say, may be as many and are none."""


def without_skipped(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, whose linears are dense, as an ordinary one with as many layers as it runs.

    Lists in the config that have an entry for each layer (which are sliding, which have no positions) keep those of the
    layers that stay.

    Args:
        model: in eval mode; some of its layers are `SkippedLayer`s.

    Raises:
        ExportError: its architecture cannot be built with fewer layers: it has several stacks, or layers that differ.
    """
    path, layers = _skipping_stack(model)
    kept = [index for index, layer in enumerate(layers) if not isinstance(layer, SkippedLayer)]
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    _shorten_(config.get_text_config(), len(layers), kept, type(model).__name__)
    places = {str(old): str(new) for new, old in enumerate(kept)}
    pattern = re.compile(rf"{re.escape(path)}\.(\d+)\.(.*)", re.DOTALL)
    weights = {}
    for name, tensor in model.state_dict().items():
        found = pattern.fullmatch(name)
        if found is None:
            weights[name] = tensor
        elif found[1] in places:
            weights[f"{path}.{places[found[1]]}.{found[2]}"] = tensor
    shallow: PreTrainedModel = type(model)(config)
    shallow.to(dtype=model.dtype)  # type: ignore[call-arg]
    shallow.eval()
    try:
        shallow.load_state_dict(weights)
    except RuntimeError as error:
        raise _cannot(
            type(model).__name__, f"other layers have other parts ({str(error).splitlines()[-1].strip()})"
        ) from error
    if model.can_generate():
        shallow.generation_config = copy.deepcopy(model.generation_config)
    return shallow


def _skipping_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name of the list with skipped layers, and the list."""
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(isinstance(layer, SkippedLayer) for layer in module)
    }
    if len(stacks) != 1 or model.config.is_encoder_decoder:
        raise _cannot(type(model).__name__, "its skipped layers are not in one list")
    return next(iter(stacks.items()))


def _shorten_(config: PreTrainedConfig, before: int, kept: list[int], name: str) -> None:
    if getattr(config, "num_hidden_layers", None) != before:
        raise _cannot(name, "its config does not say how many layers it has")
    each: dict[str, Any] = {
        key: value
        for key, value in vars(config).items()
        if isinstance(value, list | tuple) and len(value) == before and OF_LAYERS.search(key)
    }
    config.num_hidden_layers = len(kept)
    for key, value in each.items():
        setattr(config, key, type(value)(value[index] for index in kept))


def _cannot(name: str, why: str) -> ExportError:
    return ExportError(
        f"This student does without some of its teacher's layers, and a {name} with fewer cannot be built: {why}. "
        "Export it to onnx or torch, or make one without dropped layers (factorize.depth)."
    )
