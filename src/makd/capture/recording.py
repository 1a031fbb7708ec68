"""Station 4: one forward of a model, and the tensors that plans ask for, by layer and role.

Teacher and student have the same anatomy, so the same `Tap`s name the same tensors in both. Tensors are taken by
reference: nothing is copied, and nothing outlives the `Recording`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from makd.anatomy import Anatomy, Layer, Role
from makd.capture.attention import AttentionCall, record_attention

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
    model: nn.Module, anatomy: Anatomy, taps: Sequence[Tap], receive: Receiver | None = None
) -> Iterator[Recording]:
    """Record `taps` of the forward that runs inside the block; hooks are gone after it, also on an error.

    One forward a block. A backward belongs outside: with gradient checkpointing it runs parts of the forward again.

    Args:
        model: what runs.
        anatomy: of `model`.
        taps: what to record.
        receive: is handed each tensor or attention call at once, and the recording stays empty. What it computes for a
            backward is kept as it is, also inside a layer that is checkpointed.
    """
    recording = Recording()
    keep = recording.keep if receive is None else _outside_checkpoints(receive)
    with ExitStack() as hooks:
        for name, wanted in _by_module(anatomy, taps).items():
            handle = model.get_submodule(name).register_forward_hook(_keep_output(keep, wanted))
            hooks.callback(handle.remove)
        recorders = {
            model.get_submodule(name): _keep_call(keep, wanted) for name, wanted in _by_attention(anatomy, taps).items()
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


def _keep_output(keep: Receiver, wanted: list[tuple[Tap, Layer]]) -> Callable[..., None]:
    """A forward hook. Modules that several layers share are told apart by counting their calls."""
    calls = 0

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal calls
        hidden = output[0] if isinstance(output, tuple | list) else output
        for tap, layer in wanted:
            if layer.call == calls:
                part = None if tap.role is None else layer.roles[tap.role].part
                keep(tap, hidden if part is None else part.select(hidden))
        calls += 1

    return hook


def _keep_call(keep: Receiver, wanted: list[tuple[Tap, Layer]]) -> Callable[[AttentionCall], None]:
    calls = 0

    def recorder(call: AttentionCall) -> None:
        nonlocal calls
        for tap, layer in wanted:
            if layer.call == calls:
                keep(tap, call)
        calls += 1

    return recorder
