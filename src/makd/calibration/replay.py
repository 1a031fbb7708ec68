"""Station 3: one layer run again on its own, to see what its linears read and give.

What a layer gets besides hidden states (masks, positions) is noted in one forward of the whole model.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Layer
from makd.anatomy.key_cache import without_cache
from makd.anatomy.tokens import by_token, layer_tokens


@dataclass
class Calls:
    """What the layers are called with, for one batch."""

    real: Tensor
    """Real tokens, (batch, tokens)."""
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    """Layer -> arguments besides the hidden states."""
    teacher: Tensor
    """Hidden states that enter the layer in the teacher, (batch, tokens, hidden)."""
    student: Tensor
    """The same in the student."""


def note_calls(model: PreTrainedModel, anatomy: Anatomy, batch: Mapping[str, Tensor]) -> Calls:
    """One forward of `model`, to see what its layers are called with."""
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    entering: dict[int, Tensor] = {}

    def note(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest, named = (args[0], args[1:], kwargs) if args else (kwargs["hidden_states"], (), dict(kwargs))
            entering.setdefault(0, hidden)
            arguments[index] = (rest, {key: value for key, value in named.items() if key != "hidden_states"})

        return hook

    inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
    with ExitStack() as hooks:
        hooks.enter_context(without_cache(model))  # one would grow with every replay
        for layer in anatomy.layers:
            module = model.get_submodule(layer.module)
            hooks.callback(module.register_forward_pre_hook(note(layer.index), with_kwargs=True).remove)
        model(**inputs)
    real = layer_tokens(anatomy, anatomy.layers[0], inputs)
    return Calls(real, arguments, entering[0], entering[0])


def run_layer(model: nn.Module, layer: Layer, calls: Calls, hidden: Tensor) -> Tensor:
    """The layer's output hidden states, (batch, tokens, hidden)."""
    rest, named = calls.arguments[layer.index]
    output = model.get_submodule(layer.module)(hidden, *rest, **named)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


@dataclass
class Seen:
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
    model: nn.Module, layer: Layer, calls: Calls, hidden: Tensor, linears: Iterable[str], readers: Iterable[str] = ()
) -> Seen:
    """Run the layer as far as it takes to see these.

    Args:
        model: that `layer` is of.
        layer: which one.
        calls: what it is called with.
        hidden: hidden states that enter it.
        linears: names in the model. Only their first call counts: DeBERTa's read relative positions after that.
        readers: names inside the layer of modules that read something of interest; "" stands for whoever reads the
            layer's output, and lets it run to its end.
    """
    seen, linears, readers = Seen(), set(linears), set(readers)

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

    with ExitStack() as hooks, suppress(_Enough):
        for name in linears:
            hooks.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        for name in readers - {""}:
            module = model.get_submodule(f"{layer.module}.{name}")
            hooks.callback(module.register_forward_pre_hook(note_reader(name)).remove)
        seen.read_by[""] = _by_row(calls, run_layer(model, layer, calls, hidden), f"The output of {layer.module}")
    return seen
