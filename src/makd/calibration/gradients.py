"""Station 3: what a change in each linear's output does to what the model puts out, as moments of output gradients.

This is the Gauss-Newton (for probabilities: Fisher) metric, the one currency in which errors of all linears can be
compared. No labels are needed: probes take their place.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Role, linear_shape
from makd.anatomy.batches import model_inputs
from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.anatomy.tokens import by_token, is_by_token, role_tokens
from makd.calibration.experts import ExpertWatcher
from makd.calibration.moments import InputMoments
from makd.calibration.probes import Probes
from makd.errors import DataError, UnsupportedModelError

ENOUGH_ROWS = 2048
"""Rows that wait at most before they are added to moments: products of more take no less time for each, and thousands
of rows of a wide layer more memory than its moments."""


def collect_gradient_moments(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Iterable[Mapping[str, Tensor]],
    seed: int = 0,
    embeddings: Mapping[str, int] | None = None,
) -> dict[str, InputMoments]:
    """Second moments of the gradients at the outputs of every factorizable linear, over real tokens.

    What is differentiated: see `Probes.draw`.

    Args:
        model: in eval mode meanwhile; its parameters get no gradients.
        anatomy: of `model`.
        batches: model inputs; labels are not looked at.
        seed: of the probes.
        embeddings: modules before the first layer that are wanted too -> features of their outputs.

    Returns:
        Name of the linear, stack of experts or embeddings -> moments of its output gradients.

    Raises:
        DataError: there are no batches.
        UnsupportedModelError: nobody knows what the model predicts, or no gradients reach a linear, or not laid out
            by tokens.
    """
    moments = {name: InputMoments(linear_shape(model.get_submodule(name))[0], model.device) for name in anatomy.linears}
    of_linears = (*moments, *(embeddings or {}))
    moments |= {stack.name: InputMoments(stack.out_features, model.device) for stack in anatomy.stacks}
    moments |= {name: InputMoments(features, model.device) for name, features in (embeddings or {}).items()}
    expert_watcher = ExpertWatcher(model, anatomy, {})
    watcher = GradientWatcher(anatomy, moments, tuple(embeddings or ()))
    seen = 0
    with ExitStack() as hooks:
        hooks.enter_context(without_cache(model))
        hooks.enter_context(in_eval(model))
        hooks.enter_context(frozen(model))
        probes = Probes(model, anatomy, seed)
        hooks.enter_context(expert_watcher.watching(anatomy.stacks, False, watcher.watch_expert))
        for name in of_linears:
            hooks.callback(model.get_submodule(name).register_forward_hook(watcher.hook(name)).remove)
        for batch in batches:
            inputs = model_inputs(batch, model.device)
            expert_watcher.start(inputs)
            watcher.start(inputs, probes.count)
            for watcher.probe, (tensor, gradient) in enumerate(probes.draw(inputs, partial(model, **inputs))):
                torch.autograd.backward(tensor, gradient, retain_graph=watcher.probe + 1 < probes.count)
            seen += 1
    if seen == 0:
        raise DataError("Calibration needs at least one batch; it got none. Is the data empty?")
    watcher.finish()
    return moments


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter asks for a gradient: what is differentiated is what flows."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


class GradientWatcher:
    """The hooks on outputs, and what they must know of the batch that runs."""

    def __init__(self, anatomy: Anatomy, moments: Mapping[str, InputMoments], embeddings: tuple[str, ...] = ()) -> None:
        """Moments of the gradients at the outputs of linears, and of `embeddings`, will be added to `moments`."""
        self.anatomy = anatomy
        self.places = {linear.module: (layer, role) for layer in anatomy.layers for role, linear in layer.roles.items()}
        self.places |= dict.fromkeys(embeddings, (anatomy.layers[0], Role.QUERY))  # these see the first layer's tokens
        self.gradients = {name: _RowBuffer(one) for name, one in moments.items()}
        self.inputs: Mapping[str, Tensor] = {}
        self.called: set[str] = set()
        self.probe, self.probes = 0, 1

    def start(self, inputs: Mapping[str, Tensor], probes: int) -> None:
        """A new batch begins, of which there will be so many backwards; `probe` is to say which one it is."""
        self.inputs, self.probes = inputs, probes
        self.called.clear()

    def hook(self, name: str) -> Callable[..., Tensor]:
        """The forward hook of the linear called `name`."""
        return partial(self._watch, name)

    def _watch(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        layer, role = self.places[name]
        real = role_tokens(self.anatomy, layer, role, self.inputs)
        tokens = name not in self.called or is_by_token(output, real)
        self.called.add(name)

        def add(gradient: Tensor) -> None:
            if tokens:
                rows = by_token(gradient, real, f"The output of {name}")[real]
            else:  # what a later call reads are DeBERTa's relative positions
                rows = gradient.reshape(-1, gradient.shape[-1])
            # each token is looked at once: its neighbours share its probe, and say little besides
            stride = min(self.probes, len(rows))
            self.gradients[name].add(rows[self.probe % stride :: stride])

        if output.requires_grad:
            output.register_hook(add)
            return output
        # nothing before the first linears asks for gradients: they start at their outputs, in every stack. The model
        # gets a copy, since it may change it in place, and nobody may do that where gradients start
        output.requires_grad_().register_hook(add)
        return output.clone()

    def watch_expert(self, stack: str, output: Tensor, counted: Tensor) -> None:
        """Note the gradients at what an expert of `stack` gives, in the rows that count."""

        def add(gradient: Tensor) -> None:
            rows = gradient[counted]
            stride = max(1, min(self.probes, len(rows)))
            if len(rows):
                self.gradients[stack].add(rows[self.probe % stride :: stride])

        output.register_hook(add)

    def finish(self) -> None:
        """All batches have been seen."""
        for gathered in self.gradients.values():
            gathered.flush()
        without = [name for name, gathered in self.gradients.items() if gathered.moments.rows == 0]
        if without:
            raise UnsupportedModelError(
                f"No gradient of the model's outputs reaches {without[0]} (and {len(without) - 1} others): it computes "
                "part of its forward without gradients. Take a solver that needs none: 'whitened' or 'svd'."
            )


class _RowBuffer:
    """Rows on their way into moments, which cost as much for one row as for as many as there are features."""

    def __init__(self, moments: InputMoments) -> None:
        self.moments = moments
        self.waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Keep the rows, or hand all on when there are enough."""
        self.waiting.append(rows.clone())  # a slice would keep the whole gradient
        if sum(map(len, self.waiting)) >= min(self.moments.features, ENOUGH_ROWS):
            self.flush()

    def flush(self) -> None:
        """Hand on what waits."""
        if self.waiting:
            self.moments.update(torch.cat(self.waiting))
            self.waiting.clear()
