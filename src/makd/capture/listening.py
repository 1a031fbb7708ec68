"""Station 4: one forward of a trial, with every tensor that a plan may compare looked at twice.

Once when it is given, and again when the forward is over: what changed in between was changed in place.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Layer, Role
from makd.anatomy.roles import SAME_INPUT
from makd.anatomy.tokens import is_by_token, layer_tokens, role_tokens
from makd.capture.attention import AttentionCall
from makd.capture.recording import Tap, capture
from makd.errors import UnsupportedModelError

CHANGED = "are changed in place by the model after they were given"


@dataclass
class LayerTrace:
    """What one forward gave, real tokens only."""

    heard: dict[Tap, list[Tensor]] = field(default_factory=dict)
    faults: dict[Tap, str] = field(default_factory=dict)
    """What is wrong with a tensor, as the end of a sentence that begins with it."""
    output: list[Tensor] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    """Layers that read something else than the layer before them gave."""
    apart: dict[int, frozenset[Role]] = field(default_factory=dict)
    """Layer -> roles that do not read what the others of their `SAME_INPUT` read, where there are any."""


def listen(model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Tensor]) -> LayerTrace:
    """One forward, with every tensor that a plan may compare noted as it is then, and looked at again afterwards."""
    found = LayerTrace()
    kept: dict[Tap, list[tuple[Tensor, Tensor]]] = {}
    taps = tuple(_taps(anatomy))

    def receive(tap: Tap, one: Any) -> None:  # Any: what a layer gives need not be what it should
        if not isinstance(one, Tensor | AttentionCall):  # whatever stands first in what a layer gives
            found.faults[tap] = f"are a {type(one).__name__}, not one tensor"
            return
        mask: Any = one.mask if isinstance(one, AttentionCall) else None
        if mask is not None and not isinstance(mask, Tensor):
            found.faults[tap] = f"have a mask that is a {type(mask).__name__}"
            return
        tensors = [one.query, one.key] if isinstance(one, AttentionCall) else [one]
        kept[tap] = [(tensor, tensor.clone()) for tensor in tensors]

    with (
        capture(model, anatomy, taps, receive),
        _between_layers(model, anatomy) as breaks,
        _read(model, anatomy) as read,
    ):
        output = _run(model, anatomy, inputs)
    found.breaks = breaks
    found.apart = {layer.index: apart for layer in anatomy.layers if (apart := _apart(layer, read))}
    for tap in taps:
        if tap not in kept:
            found.faults.setdefault(tap, "are never given in a forward")
            continue
        layouts = _layouts(anatomy, tap, inputs)
        parts = [tensor.transpose(1, 2) if tap.role is None and tap.kind != "hidden" and tensor.dim() == 4 else tensor
                 for _, tensor in kept[tap]]  # fmt: skip
        wrong = [part for part, real in zip(parts, layouts, strict=True) if not is_by_token(part, real)]
        if wrong:
            expected = f"({', '.join(map(str, layouts[0].shape))}, ...)"
            found.faults[tap] = f"have the shape {tuple(wrong[0].shape)}, where batch and tokens are {expected}"
        elif any(differ([after], [before]) for after, before in kept[tap]):
            found.faults[tap] = CHANGED
        else:
            found.heard[tap] = [
                part.reshape(*real.shape, -1)[real.to(part.device)]  # the model may be spread over devices
                for part, real in zip(parts, layouts, strict=True)
            ]
    found.output = [_hidden_states(model, anatomy, output, inputs)]
    return found


@contextmanager
def _between_layers(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[list[str]]:
    """Inside the block, a forward fills the list with the layers that do not read what the one before them gave."""
    breaks: list[str] = []
    given: list[Tensor] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            read = args[0] if args else kwargs.get("hidden_states")
            if given and (not isinstance(read, Tensor) or differ(given[-1:], [read])):
                breaks.append(name)

        return hook

    def leave(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple | list) else output
        given[:] = [hidden.clone()] if isinstance(hidden, Tensor) else []

    with ExitStack() as hooks:
        if not anatomy.is_encoder_decoder:
            for name in dict.fromkeys(layer.module for layer in anatomy.layers):
                module = model.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave).remove)
        yield breaks


@contextmanager
def _read(model: PreTrainedModel, anatomy: Anatomy) -> Iterator[dict[str, Tensor]]:
    """Inside the block, a forward fills in what linears read that may share a factor, at their first call."""
    read: dict[str, Tensor] = {}

    with ExitStack() as hooks:
        for name in (name for group in anatomy.input_groups for name in group):
            hooks.callback(model.get_submodule(name).register_forward_hook(partial(_note, read, name)).remove)
        yield read


def _note(read: dict[str, Tensor], name: str, _module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
    if args and isinstance(args[0], Tensor):
        read.setdefault(name, args[0].clone())


def _apart(layer: Layer, read: Mapping[str, Tensor]) -> frozenset[Role]:
    apart: set[Role] = set()
    for roles in SAME_INPUT:
        known = [(role, read[layer.roles[role].module]) for role in roles
                 if role in layer.roles and layer.roles[role].module in read]  # fmt: skip
        apart |= {role for role, tensor in known[1:] if differ([known[0][1]], [tensor])}
    return frozenset(apart)


def _taps(anatomy: Anatomy) -> Iterator[Tap]:
    """Every tensor that a plan may ask for."""
    for layer in anatomy.layers:
        if layer.is_skipped:
            continue
        yield from (Tap(layer.index, "linear", role) for role in layer.roles)
        if anatomy.mixture_of(layer) is not None:
            yield Tap(layer.index, "experts")
        yield Tap(layer.index, "hidden")
        if layer.attention is not None and "attention" not in anatomy.off:
            yield Tap(layer.index, "attention")
        if layer.cross_attention is not None and "attention" not in anatomy.off:
            yield Tap(layer.index, "cross_attention")


def _layouts(anatomy: Anatomy, tap: Tap, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Real tokens of each tensor of a tap, (batch, tokens)."""
    layer: Layer = anatomy.layers[tap.layer]
    if tap.role is not None:
        return [role_tokens(anatomy, layer, tap.role, inputs)]
    own = layer_tokens(anatomy, layer, inputs)
    if tap.kind in ("hidden", "experts"):
        return [own]
    return [own, own if tap.kind == "attention" else role_tokens(anatomy, layer, Role.CROSS_KEY, inputs)]


def _run(model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Tensor]) -> Any:
    """A forward without the head, which may ask for labels, or for more than a few tokens."""
    try:
        return (model if anatomy.head is None else model.base_model)(**inputs)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be run on token ids and an attention mask ({', '.join(inputs)}), which is "
            f"all that makd gives a model: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}. "
            "Give a model that reads text; of one with several parts, the part that does."
        ) from error


def _hidden_states(
    model: PreTrainedModel, anatomy: Anatomy, output: Any, inputs: Mapping[str, Tensor]
) -> Float[Tensor, "real hidden"]:
    """Of the real tokens that a model without a head ends in.

    Raises:
        UnsupportedModelError: the model gives something else.
    """
    real = layer_tokens(anatomy, anatomy.layers[-1], inputs)
    first = output if isinstance(output, Tensor) else output[0]
    if isinstance(first, Tensor) and first.dim() == 3 and first.shape[:2] == real.shape:
        return first[real.to(first.device)]
    if anatomy.head is not None:  # what counts is then what the head makes of it
        return first.reshape(1, -1) if isinstance(first, Tensor) else torch.zeros(1, 1)
    shape = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
    raise UnsupportedModelError(
        f"{type(model).__name__} has no head that makd knows, and gives {shape} first, where hidden states of tokens "
        f"would be (batch, tokens, hidden), here ({real.shape[0]}, {real.shape[1]}, ...). Load its base model, without "
        "what projects or pools."
    )


def differ(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Whether any pair of tensors differs by more than rounding."""
    for one, other in zip(ones, others, strict=True):
        if one.shape != other.shape:
            return True
        precision = 1e-4 if one.dtype in (torch.float32, torch.float64) else 0.05
        bound = precision * max(1e-6, float(one.nan_to_num().abs().max())) if one.numel() else 0.0
        if not torch.allclose(one, other, rtol=0.0, atol=bound, equal_nan=True):
            return True
    return False
