"""Station 3: random directions in what a model puts out, whose gradients make its Gauss-Newton (or Fisher) metric.

Where the outputs are logits over a vocabulary they are made for a chunk of tokens at a time, from what the head is
handed: (tokens, vocabulary) in float32 would be the largest tensor of a calibration, several times over.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import PreTrainedModel

from makd.anatomy import Anatomy
from makd.anatomy.tokens import encoder_tokens, layer_tokens
from makd.capture import VocabularyHead, has_vocabulary_head, why_not_repeated, withhold_logits

TEXT_PROBES = 4
"""Probes of each batch where the outputs belong to whole texts: each text gives one direction a probe, so that a few
hundred texts alone say little about hundreds of dimensions."""
TOKEN_PROBES = 1
"""The same where each token has its own prediction, and so its own direction."""
CHUNK_ELEMENTS = 2**23
"""Logits that exist at a time: 32 MB in float32, a few times over."""


class Probes:
    """Draws of the metric of a model's outputs."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, seed: int) -> None:
        """Try on a few tokens whether logits can be made from what the head is handed; the head's weights are there.

        Args:
            model: in eval mode.
            anatomy: of `model`.
            seed: of the draws.
        """
        self.model, self.anatomy = model, anatomy
        predictions = anatomy.predictions
        by_token = predictions is not None and predictions.each == "token"
        self.count = TOKEN_PROBES if by_token else TEXT_PROBES
        self.generator = torch.Generator().manual_seed(seed)
        vocabulary = (
            by_token and predictions is not None and predictions.target == "classes" and predictions.size is None
        )
        self.in_chunks = vocabulary and has_vocabulary_head(model) and why_not_repeated(model) is None

    def draw(self, inputs: Mapping[str, Tensor], run: Callable[[], Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Tensors of the model's graph, each with the gradient that one probe has there (None: it is a scalar, with 1).

        What is differentiated, for one probe:

        - a model with a head: the negative log-likelihood of predictions drawn from the model itself, so that the
          expected second moment is the Fisher information (Martens & Grosse, 2015, K-FAC);
        - a regression head, or none: the inner product of the outputs (a text's mean-pooled unit embedding) with a
          random normal vector v; E[v vᵀ] = I makes it the Gauss-Newton metric of the squared error.

        Args:
            inputs: the batch, on the model's device.
            run: the forward of the model, with gradients.
        """
        with torch.enable_grad():
            if self.in_chunks:
                with withhold_logits(self.model) as call:
                    run()
                assert call.inputs is not None
                rows = call.inputs[layer_tokens(self.anatomy, self.anatomy.layers[-1], inputs).to(call.inputs.device)]
                yield rows, self._in_chunks(rows.detach(), call.head)
                return
            output = run()
            for _ in range(self.count):
                yield self._probe(output, inputs), None

    def _in_chunks(self, rows: Float[Tensor, "rows inp"], head: VocabularyHead) -> Float[Tensor, "rows inp"]:
        found = []
        for chunk in rows.split(max(1, CHUNK_ELEMENTS // len(head.weight))):
            leaf = chunk.clone().requires_grad_()
            found.append(torch.autograd.grad(self._likelihood(head.logits(leaf)), leaf)[0])
        return torch.cat(found)

    def _probe(self, output: Any, inputs: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """A scalar whose gradient is one draw from the metric of the outputs."""
        tokens, predictions = layer_tokens(self.anatomy, self.anatomy.layers[-1], inputs), self.anatomy.predictions
        if predictions is None:
            mask = tokens[..., None].to(output[0].dtype)
            values = normalize((output[0] * mask).sum(1) / mask.sum(1), dim=-1)
        else:
            values = predictions.rows(output, encoder_tokens(inputs) if predictions.target == "places" else tokens)
            if predictions.target != "numbers":
                return self._likelihood(values)
        probe: Tensor = (
            values * torch.randn(values.shape, generator=self.generator, device="cpu", dtype=torch.float32).to(values)
        ).sum()
        return probe

    def _likelihood(self, logits: Float[Tensor, "rows choices"]) -> Float[Tensor, ""]:
        """-log p of predictions drawn from p itself."""
        wide = logits.float()
        with torch.no_grad():
            reached = wide.softmax(-1).cumsum(-1)
            drawn = (
                torch.rand(len(wide), 1, generator=self.generator, device="cpu", dtype=torch.float32).to(wide)
                * reached[:, -1:]
            )
            choices = torch.searchsorted(reached, drawn, right=True)[:, 0].clamp(max=wide.shape[1] - 1)
        return cross_entropy(wide, choices, reduction="sum")
