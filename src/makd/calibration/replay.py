"""Station 3: one layer run again on its own, to see what its linears read and give.

What a layer gets besides hidden states (masks, positions) is noted by `Frame.enter`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from makd.anatomy import Layer, linear_shape
from makd.anatomy.replaced_forward import replaced_forward
from makd.anatomy.tokens import by_token
from makd.errors import SettingError

NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class NotLayerByLayer(SettingError):
    """A model whose layers cannot be run one after the other, each from the hidden states of the one before alone."""


@dataclass(frozen=True)
class Calls:
    """What the layers are called with, for one batch."""

    real: Tensor
    """Real tokens, (batch, tokens)."""
    arguments: Mapping[int, tuple[tuple[Any, ...], dict[str, Any]]]
    """Layer -> arguments besides the hidden states."""
    entering: Tensor
    """Hidden states that enter the first layer, (batch, tokens, hidden)."""
    handed: tuple[Any, ...] | None = None
    """What a layer gives after its hidden states; None if these come alone."""


def run_layer(model: nn.Module, layer: Layer, calls: Calls, hidden: Tensor) -> Tensor:
    """The layer's output hidden states, (batch, tokens, hidden).

    Raises:
        NotLayerByLayer: it hands on other things besides than the first layer does, which the next would have needed.
    """
    rest, named = calls.arguments[layer.index]
    output = model.get_submodule(layer.module)(hidden, *rest, **named)
    states, given = (output[0], output[1:]) if isinstance(output, tuple) else (output, ())
    if not are_equal(given, calls.handed or ()):
        raise NotLayerByLayer(
            f"{layer.module} hands on other things besides hidden states than the first layer does, so layers cannot "
            "be run one by one."
        )
    found: Tensor = states
    return found


def are_equal(one: Any, other: Any) -> bool:
    """Whether all tensors in two arguments are the same numbers."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(are_equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(are_equal, one, other))
    return not isinstance(one, Tensor) and not isinstance(other, Tensor)


@contextmanager
def outputs_known(model: nn.Module, known: Mapping[str, Tensor], silent: Iterable[str] = ()) -> Iterator[None]:
    """Inside the block the first call of some linears is no work.

    Args:
        model: they are in.
        known: linear -> what it gives.
        silent: linears that give zeros, since nobody looks at what they give.
    """
    with ExitStack() as stack:
        for name in (*known, *silent):
            module = model.get_submodule(name)
            stack.enter_context(replaced_forward(module, _Replay(module, module.forward, known.get(name))))
        yield


@dataclass
class _Replay:
    """A forward of `module` whose first call is no work: it gives `output`, or zeros where that is None."""

    module: nn.Module
    forward: Callable[..., Any]
    """The module's own, for all later calls."""
    output: Tensor | None
    is_done: bool = False

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self.is_done:
            return self.forward(*args, **named)
        given, self.output, self.is_done = self.output, None, True
        if given is None:
            return args[0].new_zeros(*args[0].shape[:-1], linear_shape(self.module)[0])
        return given.clone()  # the model may change it


@dataclass
class LayerTrace:
    """What one run of a layer showed of its linears; one row a token, padding included."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    """Linear -> what it read, (rows, in)."""
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """Linear -> what it gave, (rows, out)."""
    read_by: dict[str, Tensor] = field(default_factory=dict)
    """Other module of the layer -> what it read, (rows, features); "" -> the layer's output hidden states."""


def _by_row(calls: Calls, tensor: Tensor, what: str) -> Tensor:
    return by_token(tensor, calls.real, what).flatten(0, 1)


class _Enough(Exception):
    """The layer has run far enough."""


def watch_layer(
    model: nn.Module,
    layer: Layer,
    calls: Calls,
    hidden: Tensor,
    linears: Iterable[str],
    readers: Iterable[str] = (),
    known: Mapping[str, Tensor] = NOTHING,
    silent: Iterable[str] = (),
) -> LayerTrace:
    """Run the layer as far as it takes to see these.

    Args:
        model: that `layer` is of.
        layer: which one.
        calls: what it is called with.
        hidden: hidden states that enter it.
        linears: names in the model. Only their first call counts: DeBERTa's read relative positions after that.
        readers: names inside the layer of modules that read something of interest; "" stands for whoever reads the
            layer's output, and lets it run to its end.
        known: linear -> what it gives, which is not computed again.
        silent: linears that give zeros, since nobody looks at what they give.
    """
    seen, linears, readers = LayerTrace(), set(linears), set(readers)

    def stop_if_enough() -> None:
        if seen.inputs.keys() == linears and seen.read_by.keys() == readers:
            raise _Enough

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if name not in seen.inputs:
                seen.inputs[name] = _by_row(calls, inputs[0], f"The input of {name}")
                seen.outputs[name] = _by_row(calls, output, f"The output of {name}")
                stop_if_enough()

        return hook

    def note_reader(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.read_by.setdefault(name, _by_row(calls, inputs[0], f"The input of {name}"))
            stop_if_enough()

        return hook

    with ExitStack() as hooks, suppress(_Enough), outputs_known(model, known, silent):
        for name in linears:
            hooks.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        for name in readers - {""}:
            module = model.get_submodule(f"{layer.module}.{name}")
            hooks.callback(module.register_forward_pre_hook(note_reader(name)).remove)
        seen.read_by[""] = _by_row(calls, run_layer(model, layer, calls, hidden), f"The output of {layer.module}")
    return seen
