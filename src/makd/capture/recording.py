"""Station 4: one forward of a model, and the tensors that plans ask for, by layer and role.

Teacher and student have the same anatomy, so the same `Tap`s name the same tensors in both. Tensors are taken by
reference: nothing is copied but from one device to another, and nothing outlives the `Recording`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from makd.anatomy import Anatomy, Layer, Role
from makd.capture.attention import AttentionCall, Recorder, record_attention

Kind = Literal["linear", "experts", "hidden", "attention", "cross_attention"]
"""Of a tensor that a layer makes."""


@dataclass(frozen=True)
class Tap:
    """One tensor of one layer: the output of a role's linear or of its experts, its hidden states, or attention."""

    layer: int
    kind: Kind
    role: Role | None = None
    """Whose output, with kind "linear"."""


@dataclass
class Recording:
    """What one forward left behind."""

    tensors: dict[Tap, Tensor] = field(default_factory=dict)
    """Outputs of linears (batch, tokens, features) and of experts and layers (batch, tokens, hidden)."""
    attention: dict[Tap, AttentionCall] = field(default_factory=dict)

    def keep(self, tap: Tap, found: Tensor | AttentionCall) -> None:
        """Note what a tap found."""
        if isinstance(found, AttentionCall):
            self.attention[tap] = found
        else:
            self.tensors[tap] = found


Receiver = Callable[[Tap, Tensor | AttentionCall], None]
"""Takes what a tap found, while the forward goes on."""


@contextmanager
def capture(
    model: nn.Module,
    anatomy: Anatomy,
    taps: Sequence[Tap],
    receive: Receiver | None = None,
    device: torch.device | None = None,
) -> Iterator[Recording]:
    """Record `taps` of the forward that runs inside the block; hooks are gone after it, also on an error.

    One forward a block. A backward belongs outside: with gradient checkpointing it runs parts of the forward again.

    Args:
        model: what runs.
        anatomy: of `model`.
        taps: what to record.
        receive: is handed each tensor or attention call at once, and the recording stays empty. What it computes for a
            backward is kept as it is, also inside a layer that is checkpointed.
        device: where what is recorded is brought, as the batch's: a model that is spread over devices has each layer's
            elsewhere. None leaves it where it is.
    """
    recording = Recording()
    keep = recording.keep if receive is None else _outside_checkpoints(receive)
    with ExitStack() as hooks:
        for name, wanted in _by_module(anatomy, taps).items():
            handle = model.get_submodule(name).register_forward_hook(_Calls(keep, wanted, device).keep_output)
            hooks.callback(handle.remove)
        recorders: dict[nn.Module, Recorder] = {
            model.get_submodule(name): _Calls(keep, wanted, device).keep_call
            for name, wanted in _by_attention(anatomy, taps).items()
        }
        if recorders:
            hooks.enter_context(record_attention(recorders))
        yield recording


def _outside_checkpoints(receive: Receiver) -> Receiver:
    """`receive`, out of sight of gradient checkpointing.

    A checkpointed layer throws away what its forward saves and expects its second run to save the same again; but in
    the second run nobody listens. So what `receive` saves is not shown to it.
    """

    def received(tap: Tap, found: Tensor | AttentionCall) -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            receive(tap, found)

    return received


def _by_module(anatomy: Anatomy, taps: Sequence[Tap]) -> dict[str, list[tuple[Tap, Layer]]]:
    modules: dict[str, list[tuple[Tap, Layer]]] = {}
    for tap in taps:
        layer = anatomy.layers[tap.layer]
        if tap.kind == "hidden":
            modules.setdefault(layer.module, []).append((tap, layer))
        elif tap.kind == "experts":
            name = anatomy.mixture_of(layer)
            assert name is not None
            modules.setdefault(name, []).append((tap, layer))
        elif tap.kind == "linear":
            assert tap.role is not None
            modules.setdefault(layer.roles[tap.role].module, []).append((tap, layer))
    return modules


def _by_attention(anatomy: Anatomy, taps: Sequence[Tap]) -> dict[str, list[tuple[Tap, Layer]]]:
    modules: dict[str, list[tuple[Tap, Layer]]] = {}
    for tap in taps:
        layer = anatomy.layers[tap.layer]
        name = {"attention": layer.attention, "cross_attention": layer.cross_attention}.get(tap.kind)
        if name is not None:
            modules.setdefault(name, []).append((tap, layer))
    return modules


@dataclass
class _Calls:
    """What is wanted of a module, or of an attention function; layers that share it are told apart by its calls."""

    keep: Receiver
    wanted: list[tuple[Tap, Layer]]
    device: torch.device | None
    done: int = 0

    def keep_output(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        """Take what the module gives, as a forward hook."""
        hidden = output[0] if isinstance(output, tuple | list) else output
        for tap, layer in self._now():
            part = None if tap.role is None else layer.roles[tap.role].part
            self._bring(tap, hidden if part is None else part.select(hidden))

    def keep_call(self, call: AttentionCall) -> None:
        """Take what the attention function is given."""
        for tap, _ in self._now():
            self._bring(tap, call)

    def _bring(self, tap: Tap, found: Any) -> None:  # Any: what a layer gives need not be what it should
        movable = self.device is not None and isinstance(found, Tensor | AttentionCall)
        self.keep(tap, found.to(self.device) if movable else found)

    def _now(self) -> list[tuple[Tap, Layer]]:
        """What is wanted of this call, which counts."""
        self.done += 1
        return [(tap, layer) for tap, layer in self.wanted if layer.call == self.done - 1]
