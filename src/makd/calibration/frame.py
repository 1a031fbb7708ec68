"""Station 3: a model without its layers: what makes the first hidden states of a text, and what is made of the last.

In a forward of the model its layers do nothing but note what they are called with and hand on what they are given; so
weights of layers are not needed, but for the first's where layers hand each other more than hidden states (T5).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from makd.anatomy import Anatomy, Layer
from makd.anatomy.batches import model_inputs
from makd.anatomy.key_cache import without_cache, without_router_logits
from makd.anatomy.replaced_forward import replaced_forward
from makd.anatomy.tokens import is_by_token, layer_tokens
from makd.calibration.replay import Calls, NotLayerByLayer, are_equal
from makd.calibration.source import LayerSource


class _Enough(Exception):
    """The forward has gone far enough."""


class Frame:
    """What is around the layers of one stack."""

    def __init__(self, source: LayerSource, anatomy: Anatomy) -> None:
        """Look at nothing yet.

        Args:
            source: of the model and its weights.
            anatomy: of the model: one stack of layers, each called once.

        Raises:
            NotLayerByLayer: there are two stacks, or shared layers.
        """
        if len({layer.stack for layer in anatomy.layers}) > 1 or any(layer.call for layer in anatomy.layers):
            raise NotLayerByLayer(
                "Layers can be run one by one where there is one stack of them, each with weights of its own; this "
                "model has two stacks or shared layers."
            )
        self.source, self.model, self.anatomy = source, source.model, anatomy
        self.first, self.last = anatomy.layers[0], anatomy.layers[-1]
        self._plain: tuple[tuple[Any, ...] | None] | None = None
        """What layers hand on besides hidden states, once it is known to be no tensors."""
        self._compared = False
        """Whether it was looked at that what layers are called with does not follow from what others make."""

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Inside the block texts can enter and leave: the weights are there."""
        with without_cache(self.model), self.source.frame():
            yield

    @torch.no_grad()
    def enter(self, batch: Mapping[str, Tensor]) -> Calls:
        """What the layers are called with for a batch, and the hidden states that enter the first.

        Raises:
            NotLayerByLayer: something besides layers works on the hidden states between two of them, or looks at them;
                or there are several of a token (Gemma 3n).
        """
        calls = self._enter(batch, torch.clone)
        if not self._compared:
            other = self._enter(batch, torch.neg)
            for layer in self.anatomy.layers:
                if not are_equal(calls.arguments[layer.index], other.arguments[layer.index]):
                    raise NotLayerByLayer(
                        f"What {layer.module} is called with follows from the hidden states that enter it, so layers "
                        "cannot be run one by one."
                    )
            self._compared = True
        return calls

    def _enter(self, batch: Mapping[str, Tensor], made: Callable[[Tensor], Tensor]) -> Calls:
        """What layers are called with where each makes `made` of the hidden states that it is given."""
        arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        given: list[Tensor] = []
        handed: list[Any] = []

        def note(layer: Layer, hidden: Tensor, rest: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if given and hidden is not given[-1]:
                raise NotLayerByLayer(
                    f"Something besides layers works on the hidden states before {layer.module}, so layers cannot be "
                    "run one by one."
                )
            arguments[layer.index] = (rest, named)
            if not handed:
                handed.append(self._handed_on(hidden, rest, named))
            if layer is self.last:
                raise _Enough
            given[:] = [made(hidden)]
            return _in_form_of(handed[0], given[0])

        inputs, entered = model_inputs(batch, self.source.device), list[Tensor]()
        with self._layers_do(note, entered), suppress(_Enough):
            self.model(**inputs)
        real = layer_tokens(self.anatomy, self.first, inputs)
        if not is_by_token(entered[0], real):
            raise NotLayerByLayer(
                f"The hidden states that enter {self.first.module} have the shape {tuple(entered[0].shape)}, which is "
                f"not one state for each token of {tuple(real.shape)}, so layers cannot be run one by one."
            )
        return Calls(real, arguments, entered[0], handed[0])

    def leave(self, batch: Mapping[str, Tensor], calls: Calls, hidden: Tensor) -> Any:
        """The model's output where `hidden` is what its last layer gives, with gradients if they are on."""

        def give(layer: Layer, entering: Tensor, rest: tuple[Any, ...], named: dict[str, Any]) -> Any:
            # a copy: the model may change what it is given
            return _in_form_of(calls.handed, hidden.clone() if layer is self.last else entering)

        with self._layers_do(give, []):
            return self.model(**model_inputs(batch, self.source.device))

    @contextmanager
    def without_layers(self, calls: Calls) -> Iterator[None]:
        """Inside the block layers of the model give what they are given, and what they handed on in `calls`."""

        def pass_on(layer: Layer, entering: Tensor, rest: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return _in_form_of(calls.handed, entering)

        with self._layers_do(pass_on, []):
            yield

    def first_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The hidden states that enter the first layer, with gradients if they are on."""

        def stop(layer: Layer, entering: Tensor, rest: tuple[Any, ...], named: dict[str, Any]) -> Any:
            raise _Enough

        entered: list[Tensor] = []
        with self._layers_do(stop, entered), suppress(_Enough):
            self.model(**model_inputs(batch, self.source.device))
        return entered[0]

    def _handed_on(self, hidden: Tensor, rest: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...] | None:
        """What the first layer gives after its hidden states, None if these come alone; taken to be that of all."""
        if self._plain is None:
            with self.source.layer(self.first):
                module = self.model.get_submodule(self.first.module)
                output = type(module).forward(module, hidden.clone(), *rest, **named)
            found = output[1:] if isinstance(output, tuple) else None
            if any(isinstance(one, Tensor) for one in found or ()):
                return found
            self._plain = (found,)
        return self._plain[0]

    @contextmanager
    def _layers_do(self, behaviour: Callable[..., Any], entered: list[Tensor]) -> Iterator[None]:
        """Inside the block each layer does this instead of its forward; what enters the first is put into a list."""

        def forward_of(layer: Layer) -> Callable[..., Any]:
            def forward(*args: Any, **named: Any) -> Any:
                hidden, rest = (args[0], args[1:]) if args else (named["hidden_states"], ())
                if not entered:
                    entered.append(hidden)
                return behaviour(layer, hidden, rest, {key: named[key] for key in named if key != "hidden_states"})

            return forward

        with ExitStack() as stack:
            stack.enter_context(without_router_logits(self.model))
            for layer in self.anatomy.layers:
                module = self.model.get_submodule(layer.module)
                stack.enter_context(replaced_forward(module, forward_of(layer)))
            yield


def _in_form_of(handed: tuple[Any, ...] | None, hidden: Tensor) -> Any:
    return hidden if handed is None else (hidden, *handed)
