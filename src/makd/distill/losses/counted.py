"""Station 7: which tokens of a batch the losses of a plan are means over, and how many those are.

A mean over the batches of several processes, or of several accumulated ones, is right only where each batch has the
weight of what it counts: see `makd.distill.losses.shares`.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from makd.anatomy import Anatomy, Role
from makd.anatomy.tokens import IGNORE_INDEX, completion_tokens, layer_tokens, predicting_tokens, role_tokens
from makd.aspects import ActivePlan, ActiveTerm, Comparison, Term, next_labels
from makd.capture import Tap

LossKey = Comparison | str
"""What is a mean of its own: a comparison inside the layers, or the name of another term."""


class TokenMasks:
    """The tokens of one batch, as comparisons inside the layers count them."""

    def __init__(self, anatomy: Anatomy, inputs: Mapping[str, Tensor]) -> None:
        """Args are the student's anatomy, and the batch that both models read."""
        self.anatomy, self.inputs = anatomy, inputs
        self._known: dict[tuple[str, bool], tuple[Tensor, bool]] = {}

    def real(self, tap: Tap) -> tuple[Bool[Tensor, "batch tokens"], bool]:
        """Real tokens at a tap, and whether that is all of them, which a device is asked once for each stack."""
        layer = self.anatomy.layers[tap.layer]
        key = (layer.stack, tap.role in (Role.CROSS_KEY, Role.CROSS_VALUE))
        if key not in self._known:
            real = (
                layer_tokens(self.anatomy, layer, self.inputs)
                if tap.role is None
                else role_tokens(self.anatomy, layer, tap.role, self.inputs)
            )
            self._known[key] = (real, bool(real.all()))
        return self._known[key]

    def of(self, comparison: Comparison) -> Bool[Tensor, "batch tokens"] | None:
        """The tokens that a comparison is a mean over; None where that is all of them."""
        real, everywhere = self.real(comparison.tap)
        if comparison.tokens == "first":
            return real & (real.cumsum(1) == 1)
        if comparison.tokens == "completion":
            return real & completion_tokens(self.inputs)
        return None if everywhere else real


def loss_keys(plan: ActivePlan) -> tuple[LossKey, ...]:
    """All means that a plan's losses are made of, in a fixed order."""
    return (*plan.comparisons, *(active.name for active in plan.terms if not active.comparisons))


def count(plan: ActivePlan, anatomy: Anatomy, inputs: Mapping[str, Tensor]) -> dict[LossKey, Tensor | int]:
    """How many tokens, rows or pairs of rows of a batch each mean of a plan is over.

    Args:
        plan: aspects.
        anatomy: of the student.
        inputs: the batch, with labels if it has some.

    Returns:
        By `loss_keys`; `task` counts labels, and 0 where there are none.
    """
    counted, found = TokenMasks(anatomy, inputs), dict[LossKey, Tensor | int]()
    known: dict[tuple[str, bool, str], Tensor | int] = {}
    for comparison in plan.comparisons:
        tap = comparison.tap
        reads_encoder = tap.role in (Role.CROSS_KEY, Role.CROSS_VALUE)
        key = (anatomy.layers[tap.layer].stack, reads_encoder, comparison.tokens)
        if key not in known:
            mask = counted.of(comparison)
            known[key] = counted.real(tap)[0].numel() if mask is None else mask.sum()
        found[comparison] = known[key]
    rows = len(inputs["input_ids"])
    for active in plan.terms:
        if not active.comparisons:
            found[active.name] = _count_term(active, anatomy, inputs, rows)
    return found


def predicting(term: Term, anatomy: Anatomy, inputs: Mapping[str, Tensor]) -> Bool[Tensor, "batch tokens"]:
    """The tokens whose predictions a term of logits compares."""
    real = layer_tokens(anatomy, anatomy.layers[-1], inputs)
    if term.tokens == "completion" and anatomy.predictions is not None and not anatomy.is_encoder_decoder:
        return real & predicting_tokens(inputs, anatomy.predictions.label_shift)
    return real


def _count_term(active: ActiveTerm, anatomy: Anatomy, inputs: Mapping[str, Tensor], rows: int) -> Tensor | int:
    predictions = anatomy.predictions
    if active.place == "labels":
        return count_labels(inputs, 0 if predictions is None else predictions.label_shift)
    if active.term.aspect == "similarity":
        return rows * (rows - 1)
    if (
        active.place == "predictions"
        and predictions is not None
        and predictions.each == "token"
        and predictions.target != "places"
    ):
        return predicting(active.term, anatomy, inputs).sum()
    return rows


def count_labels(inputs: Mapping[str, Tensor], label_shift: int) -> Tensor | int:
    """Labels that a model's own loss is a mean over: of tokens or rows, other than -100, NaN or beyond the row."""
    labels, starts = inputs.get("labels"), inputs.get("start_positions")
    if labels is None:
        if starts is None:
            return 0
        return (starts < inputs["input_ids"].shape[1]).sum()
    if labels.is_floating_point():
        return (~labels.isnan()).sum()
    tokens = next_labels(labels) if label_shift and labels.dim() == 2 else labels
    return torch.as_tensor(tokens != IGNORE_INDEX).sum()
