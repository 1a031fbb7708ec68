"""Station 3, streamed: a calibration text sent through a teacher of which one layer at a time is in memory.

The hidden states of all batches go from layer to layer by way of the disk. What layers get besides them (masks,
positions) is noted in forwards of the model in which layers do nothing: those need embeddings only, and of the token
embeddings only the rows of the tokens at hand.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from makd.anatomy import Anatomy, Layer
from makd.anatomy.key_cache import without_cache
from makd.calibration.moments import InputMoments
from makd.calibration.replay import Calls, run_layer
from makd.calibration.statistics import InputWatcher
from makd.errors import DataError, SettingError
from makd.factorization.workfolder import WorkFolder, write_state
from makd.weights.checkpoint import Checkpoint

Batches = Sequence[Mapping[str, Tensor]]


class _Enough(Exception):
    """The forward has gone far enough."""


class LayerByLayer:
    """Calibration of a teacher on disk. Layers are run in order."""

    def __init__(
        self, checkpoint: Checkpoint, anatomy: Anatomy, batches: Batches, work: WorkFolder, device: torch.device
    ) -> None:
        """Note what layers are called with, and keep the hidden states that enter the first.

        Raises:
            DataError: there are no batches, or one is all padding.
            SettingError: the model has two stacks or shared layers, or does something of its own between two layers.
        """
        check_one_stack(anatomy)
        if not batches:
            raise DataError("Calibration needs at least one batch; it got none. Is the data empty?")
        self.checkpoint, self.model, self.anatomy = checkpoint, checkpoint.model, anatomy
        self.batches, self.work, self.device = batches, work, device
        self.calls: list[Calls] = []
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
        with torch.no_grad():
            self._note_calls()

    @torch.no_grad()
    def run(self, layer: Layer, linears: Sequence[str]) -> None:
        """Keep the moments of the inputs of `linears`, which are in `layer`, and the hidden states that leave it.

        Raises:
            DataError: a linear saw no input.
            NumericsError: activations hold NaN or infinity.
        """
        moments: dict[str, InputMoments] = {}
        watcher = InputWatcher(self.model, self.anatomy, moments)
        last = layer.index + 1 == len(self.anatomy.layers)
        with self.checkpoint.filled(self._parameters(layer), self.device), ExitStack() as stack:
            for name in linears:
                hook = self.model.get_submodule(name).register_forward_hook(watcher.hook(name))
                stack.callback(hook.remove)
            folder = None if last else stack.enter_context(self.work.write_states(layer.index + 1))
            for index, (batch, calls) in enumerate(zip(self.batches, self.calls, strict=True)):
                watcher.start(batch)
                hidden = self.work.read_states(layer.index, index).to(self.device)
                hidden = run_layer(self.model, layer, calls, hidden)
                if folder is not None:
                    write_state(folder, index, hidden)
        never = [name for name in linears if name not in moments]
        if never:
            raise DataError(f"{never[0]} (and {len(never) - 1} others) saw no input during calibration.")
        self.work.write_statistics(layer.index, moments)

    def _parameters(self, layer: Layer) -> list[str]:
        return [f"{layer.module}.{name}" for name, _ in self.model.get_submodule(layer.module).named_parameters()]

    def _note_calls(self) -> None:
        first = self.anatomy.layers[0]
        with ExitStack() as stack:
            stack.enter_context(without_cache(self.model))  # one would hold what every layer gives
            stack.enter_context(self.checkpoint.filled(self._frame(), self.device))
            stack.enter_context(self._embedding_rows())
            with self.checkpoint.filled(self._parameters(first), self.device):
                imitate = self._see_output(self._inputs(self.batches[0]))
            fresh = not any(self.work.has_states(layer.index) for layer in self.anatomy.layers)
            folder = stack.enter_context(self.work.write_states(0)) if fresh else None
            for index, batch in enumerate(self.batches):
                calls = self._note(self._inputs(batch), imitate)
                if folder is not None:
                    write_state(folder, index, calls.teacher)
                nothing = torch.empty(0)
                self.calls.append(Calls(nothing, calls.arguments, nothing, nothing))

    def _inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in batch.items() if key != "labels"}

    def _frame(self) -> list[str]:
        """Parameters of the model without its head that are in no layer, but for the token embeddings."""
        base = self.model.base_model
        prefix = "" if base is self.model else f"{self.model.base_model_prefix}."
        apart = (*(f"{layer.module}." for layer in self.anatomy.layers), *self._by_rows())
        names = (prefix + name for name, _ in base.named_parameters())
        return [name for name in names if not name.startswith(apart)]

    def _by_rows(self) -> tuple[str, ...]:
        """The matrix of the token embeddings, of which rows are read as they are needed."""
        modules = ((name, self.model.get_submodule(name)) for name in self.anatomy.embeddings)
        return tuple(f"{name}.weight" for name, module in modules if isinstance(module, nn.Embedding))

    @contextmanager
    def _embedding_rows(self) -> Iterator[None]:
        """Inside the block the token embeddings have, in each call, just the rows that it asks for."""
        with ExitStack() as stack:
            for weight in self._by_rows():
                module = self.model.get_submodule(weight.removesuffix(".weight"))
                assert isinstance(module, nn.Embedding)
                stack.callback(setattr, module, "weight", module.weight)
                stack.callback(setattr, module, "padding_idx", module.padding_idx)
                module.padding_idx = None  # it is a row of the whole matrix, and matters to gradients only
                hook = module.register_forward_pre_hook(self._read_rows(weight))
                stack.callback(hook.remove)
            yield

    def _read_rows(self, weight: str) -> Callable[..., tuple[Any, ...]]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            needed, places = torch.unique(inputs[0], return_inverse=True)
            rows = self.checkpoint.rows(weight, needed).to(self.device)
            module.weight = nn.Parameter(rows, requires_grad=False)
            return (places, *inputs[1:])

        return hook

    def _see_output(self, inputs: dict[str, Tensor]) -> Callable[[Tensor], Any]:
        """Run the first layer, to see in which form layers give their hidden states; makes that form of some."""
        seen: list[Any] = []

        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.append(output)
            raise _Enough

        hook = self.model.get_submodule(self.anatomy.layers[0].module).register_forward_hook(stop)
        with suppress(_Enough):
            self.model(**inputs)
        hook.remove()
        if isinstance(seen[0], tuple):
            rest = (None,) * (len(seen[0]) - 1)
            return lambda hidden: (hidden, *rest)
        return lambda hidden: hidden

    def _note(self, inputs: dict[str, Tensor], imitate: Callable[[Tensor], Any]) -> Calls:
        """One forward in which layers only note what they are called with."""
        arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        entering: list[Tensor] = []
        last = self.anatomy.layers[-1].index

        def idle(layer: Layer) -> Callable[..., Any]:
            def forward(*args: Any, **named: Any) -> Any:
                hidden, rest = (args[0], args[1:]) if args else (named["hidden_states"], ())
                if entering and hidden is not entering[-1]:
                    raise SettingError(
                        f"Something besides layers works on the hidden states before {layer.module}, so they cannot "
                        "go from layer to layer by way of the disk. Solver 'svd' can stream this model."
                    )
                arguments[layer.index] = (rest, {key: named[key] for key in named if key != "hidden_states"})
                if layer.index == last:
                    entering.append(hidden)
                    raise _Enough
                entering.append(hidden.clone() if entering else hidden)
                return imitate(entering[-1])

            return forward

        with ExitStack() as stack, suppress(_Enough):
            for layer in self.anatomy.layers:
                module = self.model.get_submodule(layer.module)
                module.forward = idle(layer)
                stack.callback(delattr, module, "forward")
            self.model(**inputs)
        return Calls(torch.empty(0), arguments, entering[0], entering[0])


def check_one_stack(anatomy: Anatomy) -> None:
    """Layers can be run one by one.

    Raises:
        SettingError: they cannot: there are two stacks, or layers that are called several times.
    """
    if len({layer.stack for layer in anatomy.layers}) > 1 or any(layer.call for layer in anatomy.layers):
        raise SettingError(
            "Calibration layer by layer needs one stack of layers of their own; this model has two stacks or shared "
            "layers. Solver 'svd' can stream it, and needs no text."
        )
