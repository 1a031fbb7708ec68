"""Station 1: from a model to its `Anatomy`: by its family's row, or from its structure where only one reading fits.

Every later station begins here. Teachers and students resolve alike: a factored linear keeps its name and its shape.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from makd.anatomy.experts import describe_experts, find_experts, find_stacks
from makd.anatomy.families import Fused, Place, Stack
from makd.anatomy.predictions import predictions_of
from makd.anatomy.roles import Anatomy, Layer, Role, RoleLinear
from makd.anatomy.sizes import config_of
from makd.anatomy.skipped import SkippedLayer
from makd.anatomy.structure import find_stack
from makd.anatomy.table import ANATOMIES, REFUSED
from makd.errors import UnsupportedModelError
from makd.sentence_encoder import origin_of

HEAD_NAMES = (
    "lm_head",
    "cls",
    "classifier",
    "qa_outputs",
    "score",
    "classification_head",
    "qa_classifier",
    "discriminator_predictions",
)
"""Where models keep what makes predictions, if `get_output_embeddings` does not say."""


def resolve(model: PreTrainedModel) -> Anatomy:
    """Where `model` keeps its layers, linears, attention, embeddings and head. Students resolve like their teachers.

    Raises:
        UnsupportedModelError: the architecture is not known, and its structure leaves more than one reading or none;
            or it is known, but a linear is not where the family keeps it.
    """
    model_type = str(getattr(model.config, "model_type", ""))
    base, prefix = _base_model(model)
    family = ANATOMIES.get(model_type)
    notes: tuple[str, ...] = ()
    if family is not None:
        name, off = model_type, family.off
        stacks = [stack for stack in family.stacks if _has(base, stack.layers)]
    else:
        name = "resolved from structure"
        stack, notes, off = _from_structure(base, model_type)
        stacks = [stack]
    layers: list[Layer] = []
    for stack in stacks:
        layers += _layers(base, prefix, stack, len(layers), config_of(base, stack.layers))
    if not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {model_type!r}) has no layers where its family keeps them, so nothing "
            "to factorize. Give a model with at least one layer, or add a row to makd/anatomy/table."
        )
    linears = tuple(dict.fromkeys(linear.module for layer in layers for linear in layer.roles.values()))
    if family is not None:
        notes = _left_dense(model, layers, frozenset(linears))
    if skipped := [str(layer.index) for layer in layers if layer.is_skipped]:
        notes += (f"these layers are dropped, and give on what they get: {', '.join(skipped)}",)
    experts = find_experts(model, layers)
    of_experts, why_dense = find_stacks(model, layers)
    notes += describe_experts(layers, experts, of_experts, why_dense)
    embeddings = _embeddings(model)
    if not embeddings:
        notes += (f"{type(model).__name__} does not say where its token embeddings are; they are not counted apart",)
    return Anatomy(
        family=name,
        layers=tuple(layers),
        linears=linears,
        embeddings=embeddings,
        head=_head(model),
        predictions=predictions_of(model),
        is_encoder_decoder=bool(getattr(model.config, "is_encoder_decoder", False)),
        experts=experts,
        stacks=of_experts,
        off=dict(off),
        dense_vocabulary=None if family is None else family.dense_vocabulary,
        origin=origin_of(model),
        notes=notes,
    )


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear: `nn.Linear`, transformers' `Conv1D`, or a factored one.

    Raises:
        UnsupportedModelError: the module is none of these.
    """
    if isinstance(linear, Conv1D):
        return linear.weight.shape[1], linear.weight.shape[0]
    shape = getattr(linear, "out_features", None), getattr(linear, "in_features", None)
    if not isinstance(shape[0], int) or not isinstance(shape[1], int):
        raise UnsupportedModelError(f"{type(linear).__name__} is not a linear that makd could factorize.")
    return shape[0], shape[1]


def _base_model(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """The model without its head, and what stands before its names."""
    base = model.base_model
    if base is model:
        return model, ""
    return base, f"{model.base_model_prefix}."


def _from_structure(base: nn.Module, model_type: str) -> tuple[Stack, tuple[str, ...], Mapping[str, str]]:
    """The one stack that `base` can be read as, lines about it, and the aspects that are then off."""
    if model_type in REFUSED:
        raise UnsupportedModelError(
            f"makd cannot take in {type(base).__name__} (model type {model_type!r}): {REFUSED[model_type]}."
        )
    known = sorted(ANATOMIES)
    stack, notes, off = find_stack(base, model_type, known)
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"makd does not know {type(base).__name__} (model type {model_type!r}). It is an encoder-decoder, of which "
            f"only {stack.layers} can be read from its structure: names do not tell cross-attention from "
            f"self-attention. Known model types: {', '.join(known)}. A new one is a row in "
            "makd/anatomy/table, or a Family of your own package."
        )
    return stack, notes, off


def _has(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def _layers(base: nn.Module, prefix: str, stack: Stack, first: int, config: object) -> Iterator[Layer]:
    calls: dict[str, int] = {}
    for index, name in enumerate(_layer_names(base, stack, config)):
        layer = base.get_submodule(name)
        if isinstance(layer, SkippedLayer):
            yield Layer(first + index, stack.kind, prefix + name, 0, {}, None)
            continue
        roles: dict[Role, RoleLinear] = {}
        for role, place in (*stack.linears.items(), *_variant(layer, stack), *stack.down.items()):
            module = place.module if isinstance(place, Fused) else place
            if not _has(layer, module):
                raise UnsupportedModelError(
                    f"{type(base).__name__} has no {name}.{module}, where its family keeps {role.value!r}. It is a "
                    "variant that makd does not know; add a row for it to makd/anatomy/table."
                )
            out_features, _ = linear_shape(layer.get_submodule(module))
            part = place.locate(out_features, config) if isinstance(place, Fused) else None
            roles[role] = RoleLinear(f"{prefix}{name}.{module}", part)
        calls[name] = calls.get(name, -1) + 1
        yield Layer(
            index=first + index,
            stack=stack.kind,
            module=prefix + name,
            call=calls[name],
            roles=roles,
            attention=None if stack.attention is None else f"{prefix}{name}.{stack.attention}",
            cross_attention=None if stack.cross_attention is None else f"{prefix}{name}.{stack.cross_attention}",
            apart=stack.apart,
        )


def _variant(layer: nn.Module, stack: Stack) -> Iterator[tuple[Role, Place]]:
    """The linears of the first variant that the layer has; of the last, to be missed by name, if it has none."""
    if not stack.variants:
        return iter(())
    fitting = (
        variant
        for variant in stack.variants
        if all(_has(layer, place.module if isinstance(place, Fused) else place) for place in variant.values())
    )
    return iter(next(fitting, stack.variants[-1]).items())


def _layer_names(base: nn.Module, stack: Stack, config: object) -> Iterator[str]:
    """Names of the layers in the order of a forward; a shared one as often as it is called."""
    modules = base.get_submodule(stack.layers)
    assert isinstance(modules, nn.ModuleList)
    if stack.shared_in_groups is None:
        yield from (f"{stack.layers}.{index}" for index in range(len(modules)))
        return
    count = int(config.num_hidden_layers)  # type: ignore[attr-defined]
    for index in range(count):
        group = int(index / (count / len(modules)))
        inner = modules[group].get_submodule(stack.shared_in_groups)
        assert isinstance(inner, nn.ModuleList)
        yield from (f"{stack.layers}.{group}.{stack.shared_in_groups}.{number}" for number in range(len(inner)))


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)


def _left_dense(model: nn.Module, layers: Sequence[Layer], linears: frozenset[str]) -> tuple[str, ...]:
    """A line that names the linears of layers that play no role, by their names in a layer; none if all play one."""
    names = (
        name
        for layer in layers
        for name, module in model.get_submodule(layer.module).named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not _inside(f"{layer.module}.{name}", linears)
    )
    left = tuple(dict.fromkeys(names))
    return (f"these linears of a layer play no role in makd and stay dense: {', '.join(left)}",) if left else ()


def _inside(name: str, linears: frozenset[str]) -> bool:
    """Whether `name` is one of `linears`, or stands inside one (a factor of a factored linear)."""
    steps = name.split(".")
    return any(".".join(steps[:depth]) in linears for depth in range(1, len(steps) + 1))


def _embeddings(model: PreTrainedModel) -> tuple[str, ...]:
    try:
        name = _name_of(model, model.get_input_embeddings())
    except NotImplementedError:  # transformers could not find them either
        name = None
    return () if name is None else (name,)


def _head(model: PreTrainedModel) -> str | None:
    name = _name_of(model, model.get_output_embeddings())
    return name or next((head for head in HEAD_NAMES if hasattr(model, head)), None)
