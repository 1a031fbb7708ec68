"""Station 3: where a linear's output joins the residual stream, found by trying instead of by name.

A linear that adds to the stream can also take back what the student's earlier factors did to it. `fit_layers_` asks
here where that sum is to be read.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

NUDGE = 4.0
"""Size of the trial change, relative to the mean magnitude of the output: well above what bfloat16 rounds away."""
TOLERANCE = 1e-2
"""How exactly the change has to arrive, relative to its size, besides what the sum is rounded to."""


@dataclass(frozen=True)
class Sum:
    """The place in a layer where a linear's output has been added to something else, and nothing more."""

    module: str
    """Name inside the layer of the module that reads the sum; empty where the sum is the layer's output."""


@torch.no_grad()
def find_sum(layer: nn.Module, linear: nn.Module, forward: Callable[[], Tensor]) -> Sum | None:
    """Where `linear`'s output arrives unchanged in a sum with other things; None where it does not.

    In layers that normalise after the sum (BERT) that is the input of the norm; in those that normalise before
    (Llama, GPT-2, T5), the next norm's input or the layer's output; a norm between linear and sum (Gemma 2) makes it
    None. The layer is run twice, the second time with a nudge on the linear's output that differs by feature.

    Args:
        layer: holds `linear`; in eval mode.
        linear: in forward order one of its submodules.
        forward: runs the layer once and returns its output hidden states, (batch, tokens, hidden).
    """
    outputs: list[Tensor] = []

    def keep(output: Tensor) -> Tensor:
        outputs.append(output)
        return output

    plain = _trace(layer, linear, forward, keep)
    own = outputs[0]
    pattern = torch.linspace(-1, 1, own.shape[-1], device=own.device, dtype=own.dtype)
    change = NUDGE * own.abs().mean() * pattern.expand_as(own)
    nudged = _trace(layer, linear, forward, lambda output: output + change)
    for name, before in plain.items():
        after = nudged[name]
        if before.shape[-1] != own.shape[-1] or before.numel() != own.numel():
            continue
        before, after = before.reshape(own.shape), after.reshape(own.shape)  # OPT's linears see (rows, features)
        rounding = 4 * torch.finfo(own.dtype).eps * (before.abs() + after.abs())
        arrived = (after - before - change).abs() <= TOLERANCE * change.abs().max() + rounding
        joined = (before - own).abs().max() > TOLERANCE * own.abs().max()
        if bool(arrived.all()) and bool(joined):
            return Sum(name)
    return None


def _trace(
    layer: nn.Module, linear: nn.Module, forward: Callable[[], Tensor], change: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """First inputs of the modules that run after `linear`, in that order; the layer's output, as "", comes last."""
    trace = _Trace(change)
    with ExitStack() as hooks:
        hooks.callback(linear.register_forward_hook(trace.after_linear).remove)
        for name, module in layer.named_modules():
            if name:
                hooks.callback(module.register_forward_pre_hook(partial(trace.note, name)).remove)
        trace.seen[""] = forward()
    return trace.seen


@dataclass
class _Trace:
    """What is read once a linear has given its output, which is changed."""

    change: Callable[[Tensor], Tensor]
    seen: dict[str, Tensor] = field(default_factory=dict)
    passed: bool = False

    def after_linear(self, _module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        self.passed = True
        return self.change(output)

    def note(self, name: str, _module: nn.Module, inputs: tuple[object, ...]) -> None:
        if self.passed and name not in self.seen and inputs and isinstance(inputs[0], Tensor):
            self.seen[name] = inputs[0]
