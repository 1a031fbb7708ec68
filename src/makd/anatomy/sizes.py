"""Station 1: how wide a layer is and how many heads it has, by the config of the part of the model that it stands in.

A model of several parts (encoder and decoder with a config each, a language model beside a vision tower) has these
numbers in its parts' configs, and none of its own.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from makd.anatomy.roles import Layer
from makd.anatomy.stand_in import StandIn


def config_of(model: nn.Module, name: str) -> Any:
    """The config of the innermost part of `model` that the module called `name` stands in.

    Args:
        model: a transformers model.
        name: as `model.get_submodule` takes it.
    """
    found = model
    steps = name.split(".")
    for depth in range(len(steps)):
        part = model.get_submodule(".".join(steps[:depth]))
        if isinstance(part, PreTrainedModel):
            found = part
    config: Any = found.config
    return config.get_text_config()


def hidden_width(model: nn.Module, layer: Layer) -> int:
    """How many channels the hidden states of `layer` have."""
    return int(config_of(model, layer.module).hidden_size)


def head_count(model: nn.Module, layer: Layer) -> int:
    """How many heads the attention of `layer` has."""
    config = config_of(model, layer.module)
    # encoder-decoders with one config say it by stack, and call the encoder's `num_attention_heads` besides
    names = (f"{layer.stack}_attention_heads", f"num_{layer.stack}_attention_heads", "num_attention_heads")
    return int(next(getattr(config, name) for name in names if getattr(config, name, None) is not None))


def embedding_shape(model: PreTrainedModel) -> tuple[int, int]:
    """How many tokens the embeddings of `model` know, and how wide they are; factored ones too."""
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, StandIn):
        stand_in: Any = embeddings
        return int(stand_in.num_embeddings), int(stand_in.embedding_dim)
    rows, width = embeddings.get_parameter("weight").shape
    return int(rows), int(width)


def total_parameters(model: nn.Module) -> int:
    """Parameters of `model`, shared ones once, with the whole numbers that stand-ins have besides."""
    return sum(parameter.numel() for parameter in model.parameters()) + whole_numbers(model)


def whole_numbers(model: nn.Module) -> int:
    """How many numbers stand-ins in `model` have that are no weights, and count as parameters."""
    return sum(module.whole_numbers for module in model.modules() if isinstance(module, StandIn))
