"""Station 3: what a change in each linear's output does to what the model puts out, as moments of output gradients.

This is the Gauss-Newton (for probabilities: Fisher) metric, the one currency in which errors of all linears can be
compared. No labels are needed: probes take their place.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Layer, Role, linear_shape
from makd.anatomy.key_cache import without_cache
from makd.anatomy.tokens import by_token, encoder_tokens, is_by_token, layer_tokens, role_tokens
from makd.calibration.moments import InputMoments
from makd.errors import DataError, UnsupportedModelError

TEXT_PROBES = 4
"""Backwards for each batch where the outputs belong to whole texts: each text gives one direction a probe, so that a
few hundred texts alone say little about hundreds of dimensions."""
TOKEN_PROBES = 1
"""The same where each token has its own prediction, and so its own direction."""


def collect_gradient_moments(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Iterable[Mapping[str, Tensor]],
    seed: int = 0,
    embeddings: Mapping[str, int] | None = None,
) -> dict[str, InputMoments]:
    """Second moments of the gradients at the outputs of every factorizable linear, over real tokens.

    What is differentiated, for one probe:

    - a model with a head: the negative log-likelihood of predictions drawn from the model itself, so that the expected
      second moment is the Fisher information (Martens & Grosse, 2015, K-FAC);
    - a regression head, or none: the inner product of the outputs (a text's mean-pooled unit embedding) with a random
      normal vector v; E[v vᵀ] = I makes it the Gauss-Newton metric of the squared error.

    Args:
        model: in eval mode meanwhile; its parameters get no gradients.
        anatomy: of `model`.
        batches: model inputs; labels are not looked at.
        seed: of the probes.
        embeddings: modules before the first layer that are wanted too -> features of their outputs.

    Returns:
        Name of the linear (or embeddings) -> moments of its output gradients.

    Raises:
        DataError: there are no batches.
        UnsupportedModelError: nobody knows what the model predicts, or no gradients reach a linear, or not laid out
            by tokens.
    """
    moments = {name: InputMoments(linear_shape(model.get_submodule(name))[0], model.device) for name in anatomy.linears}
    moments |= {name: InputMoments(features, model.device) for name, features in (embeddings or {}).items()}
    places = {linear.module: (layer, role) for layer in anatomy.layers for role, linear in layer.roles.items()}
    places |= dict.fromkeys(embeddings or (), (anatomy.layers[0], Role.QUERY))  # these see the first layer's tokens
    watcher = _Watcher(anatomy, places, {name: _Gathered(one) for name, one in moments.items()})
    generator = torch.Generator().manual_seed(seed)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval().requires_grad_(False)

    seen = 0
    with ExitStack() as hooks:
        hooks.enter_context(without_cache(model))
        hooks.callback(model.train, was_training)
        for parameter in wanted:
            hooks.callback(parameter.requires_grad_, True)
        for name in moments:
            hooks.callback(model.get_submodule(name).register_forward_hook(watcher.hook(name)).remove)
        for batch in batches:
            inputs = {key: value.to(model.device) for key, value in batch.items() if key != "labels"}
            watcher.start(inputs)
            with torch.enable_grad():
                output = model(**inputs)
                watcher.probes = probes = _probes(anatomy)
                for watcher.probe in range(probes):
                    loss = _probe(output, anatomy, inputs, generator)
                    torch.autograd.backward(loss, retain_graph=watcher.probe + 1 < probes)
            seen += 1
    if seen == 0:
        raise DataError("Calibration needs at least one batch; it got none. Is the data empty?")
    watcher.finish()
    return moments


class _Watcher:
    """The hooks, and what they must know of the batch that runs."""

    def __init__(
        self, anatomy: Anatomy, places: Mapping[str, tuple[Layer, Role]], gradients: Mapping[str, "_Gathered"]
    ) -> None:
        self.anatomy, self.places, self.gradients = anatomy, places, gradients
        self.inputs: Mapping[str, Tensor] = {}
        self.called: set[str] = set()
        self.probe, self.probes = 0, 1

    def start(self, inputs: Mapping[str, Tensor]) -> None:
        """A new batch begins."""
        self.inputs = inputs
        self.called.clear()

    def hook(self, name: str) -> Callable[..., Tensor]:
        """The forward hook of the linear called `name`."""
        layer, role = self.places[name]

        def watch(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
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
            # nothing before the first linears asks for gradients: they start at their outputs, in every stack. The
            # model gets a copy, since it may change it in place, and nobody may do that where gradients start
            output.requires_grad_().register_hook(add)
            return output.clone()

        return watch

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


class _Gathered:
    """Rows on their way into moments, which cost as much for one row as for as many as there are features."""

    def __init__(self, moments: InputMoments) -> None:
        self.moments = moments
        self.waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Keep the rows, or hand all on when they fill as much memory as the moments do."""
        self.waiting.append(rows.clone())  # a slice would keep the whole gradient
        if sum(map(len, self.waiting)) >= self.moments.features:
            self.flush()

    def flush(self) -> None:
        """Hand on what waits."""
        if self.waiting:
            self.moments.update(torch.cat(self.waiting))
            self.waiting.clear()


def _probes(anatomy: Anatomy) -> int:
    by_token = anatomy.predictions is not None and anatomy.predictions.each == "token"
    return TOKEN_PROBES if by_token else TEXT_PROBES


def _probe(output: Any, anatomy: Anatomy, inputs: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """A scalar whose gradient is one draw from the metric of the outputs."""
    tokens, predictions = layer_tokens(anatomy, anatomy.layers[-1], inputs), anatomy.predictions
    if predictions is None:
        mask = tokens[..., None].to(output[0].dtype)
        values = normalize((output[0] * mask).sum(1) / mask.sum(1), dim=-1)
    else:
        values = predictions.rows(output, encoder_tokens(inputs) if predictions.law == "places" else tokens)
        if predictions.law != "numbers":
            return _likelihood(values, generator)
    probe: Tensor = (values * torch.randn(values.shape, generator=generator).to(values)).sum()
    return probe


def _likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    """-log p of predictions drawn from p itself."""
    with torch.no_grad():
        noise = -torch.empty(logits.shape).exponential_(generator=generator).log().to(logits.device)
        drawn = (logits.float() + noise).argmax(-1)  # Gumbel's trick: a draw from the softmax
    return cross_entropy(logits.float(), drawn, reduction="sum")
