"""Before the flow: from a model, perhaps without weights, to what of it costs time and memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Layer, Role
from makd.anatomy.sizes import embedding_shape
from makd.calibration.probes import TEXT_PROBES, TOKEN_PROBES
from makd.forecasting.operations import LayerShape
from makd.ranks.allocation import LinearSize


@dataclass(frozen=True)
class ModelShape:
    """Layers, and what stands around them. Bytes are of weights, in the dtype that they have in the model."""

    layers: tuple[LayerShape, ...]
    """As they are called: layers that share their weights stand here as often."""
    hidden: int
    """Features of the hidden states."""
    itemsize: int
    """Bytes of a number of the hidden states."""
    weight_bytes: int
    layer_bytes: int
    """Of the largest layer."""
    row_bytes: int
    """Of one token's embedding."""
    head: int = 0
    """Weights of the head that makes logits over a vocabulary; 0 where there is none."""
    vocabulary: int = 0
    """Its logits for each token."""
    probes: int = TEXT_PROBES
    """Backwards of each batch."""

    @property
    def own_layers(self) -> tuple[LayerShape, ...]:
        """Layers with weights of their own: those that share them stand here once."""
        return tuple({layer.linears: layer for layer in self.layers}.values())

    @property
    def head_bytes(self) -> int:
        """Of its weights."""
        return self.head * self.itemsize


def shape_of(model: PreTrainedModel, anatomy: Anatomy, sizes: Sequence[LinearSize]) -> ModelShape:
    """The shape of `model`, whose linears have these `sizes`."""
    known = {size.name: size for size in sizes}
    groups = {name: group for group in anatomy.input_groups for name in group}
    layers = tuple(_layer(model, layer, known, groups, anatomy) for layer in anatomy.layers)
    by_token = anatomy.predictions is not None and anatomy.predictions.each == "token"
    over_vocabulary = anatomy.predictions is not None and by_token and anatomy.predictions.size is None
    rows, width = embedding_shape(model)
    first = next(iter(model.get_submodule(anatomy.layers[0].module).parameters()))
    head = model.get_output_embeddings() if over_vocabulary else None
    modules = dict.fromkeys(layer.module for layer in anatomy.layers)
    return ModelShape(
        layers=layers,
        hidden=_hidden(model, width),
        itemsize=first.element_size(),
        weight_bytes=_bytes(model),
        layer_bytes=max(_bytes(model.get_submodule(name)) for name in modules),
        row_bytes=width * first.element_size(),
        head=0 if head is None else head.get_parameter("weight").numel(),
        vocabulary=0 if head is None else rows,
        probes=TOKEN_PROBES if by_token else TEXT_PROBES,
    )


def _layer(
    model: PreTrainedModel,
    layer: Layer,
    sizes: Mapping[str, LinearSize],
    groups: Mapping[str, tuple[str, ...]],
    anatomy: Anatomy,
) -> LayerShape:
    names = list(layer.linears)
    inputs = dict.fromkeys(groups.get(name, (name,)) for name in names)
    experts = sum(model.get_parameter(name).numel() for name in anatomy.experts if name.startswith(f"{layer.module}."))
    features = {role: sizes[one.module].out_features if one.part is None else one.part.features
                for role, one in layer.roles.items()}  # fmt: skip
    return LayerShape(
        tuple(tuple(sizes[name] for name in group) for group in inputs),
        features.get(Role.QUERY, 0) * (2 if layer.cross_attention else 1),
        round(experts * _active_share(model)),
        features.get(Role.KEY, 0) + features.get(Role.VALUE, 0),
    )


def _active_share(model: PreTrainedModel) -> float:
    """Share of the routed experts that a token goes through, as configs tell it."""
    settings = vars(model.config.get_text_config())
    active = settings.get("num_experts_per_tok") or settings.get("moe_top_k")
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    number = next((settings[name] for name in names if settings.get(name)), None)
    return min(1.0, active / number) if isinstance(active, int) and isinstance(number, int) else 1.0


def _hidden(model: PreTrainedModel, width: int) -> int:
    size = getattr(model.config.get_text_config(), "hidden_size", None)
    return size if isinstance(size, int) else width


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
