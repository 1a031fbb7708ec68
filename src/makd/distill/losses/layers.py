"""Station 7: the losses inside the layers, each made as soon as both sides are there.

The teacher's forward comes first and is recorded. Then, while the student's runs, every tensor that it hands over is
compared with the teacher's on the spot, and the teacher's is let go: after the student's forward nothing is left of a
recording but the losses, and what their backward needs.
"""

from collections import Counter
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from makd.anatomy import Anatomy
from makd.anatomy.tokens import by_token
from makd.aspects import ActivePlan, Comparison, attention_loss, cosine_distance, normalised_mse, own_loss, relation_kl
from makd.capture import AttentionCall, Recording, Tap
from makd.distill.losses.counted import TokenMasks
from makd.distill.losses.projections import Projections


class LayerLosses(dict[Comparison, Float[Tensor, ""]]):
    """Loss of every comparison that the student has reached so far: of an aspect, at one layer, for one role."""

    def __init__(
        self,
        anatomy: Anatomy,
        inputs: Mapping[str, Tensor],
        teacher: Recording,
        plan: ActivePlan,
        projections: Projections | None = None,
        units: Mapping[Comparison, float] | None = None,
    ) -> None:
        """Nothing is compared yet.

        Args:
            anatomy: of the student.
            inputs: the batch that both models read.
            teacher: what the teacher's forward left, without gradients. It is emptied on the way.
            plan: what is compared with what.
            projections: take the student's states to the teacher's width, where that differs.
            units: what squared differences are measured in; None takes the teacher's variance in this batch.
        """
        super().__init__()
        self.teacher, self.projections = teacher, projections
        self._units = units or {}
        self._tokens = TokenMasks(anatomy, inputs)
        self._wanted: dict[Tap, list[Comparison]] = {}
        for comparison in plan.comparisons:
            self._wanted.setdefault(comparison.tap, []).append(comparison)
        self._due = Counter(comparison.teacher for comparison in plan.comparisons)

    def receive(self, tap: Tap, ours: Tensor | AttentionCall) -> None:
        """Compare what the student has at a tap, which is a `capture` receiver."""
        for comparison in self._wanted[tap]:
            self._due[comparison.teacher] -= 1
            is_last = self._due[comparison.teacher] == 0
            counted = self._tokens.of(comparison)
            if isinstance(ours, AttentionCall):
                calls = self.teacher.attention
                call = calls.pop(comparison.teacher) if is_last else calls[comparison.teacher]
                self[comparison] = compare_calls(call, ours, counted)
                continue
            tensors = self.teacher.tensors
            theirs = tensors.pop(comparison.teacher) if is_last else tensors[comparison.teacher]
            # a teacher that is spread over devices has layers elsewhere
            self[comparison] = self._states(comparison, ours, theirs.to(ours.device), counted)

    def _states(
        self, comparison: Comparison, ours: Tensor, theirs: Tensor, counted: Bool[Tensor, "batch tokens"] | None
    ) -> Float[Tensor, ""]:
        real, everywhere = self._tokens.real(comparison.tap)
        # OPT joins rows before its feed-forward: every tensor is given its (batch, tokens) back
        student, teacher = (by_token(side, real, f"What layer {comparison.tap.layer} gives") for side in (ours, theirs))
        if comparison.measure == "relation":
            return relation_kl(student, teacher, None if everywhere else real, comparison.heads, counted)
        if self.projections is not None:
            student = self.projections.apply_to(comparison.tap, student)
        if comparison.measure == "own":
            return own_loss(comparison.aspect, student, teacher, real if counted is None else counted)
        if comparison.measure == "cosine":
            return cosine_distance(student, teacher, counted)
        return normalised_mse(student, teacher, counted, self._units.get(comparison))


def compare_calls(
    theirs: AttentionCall, ours: AttentionCall, real: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, ""]:
    """KL(teacher ‖ student) of what attention looks at, in nats: a mean over heads and the queries that are `real`."""
    theirs = theirs.to(ours.query.device)
    biased = theirs.position_bias is not None
    # both read the same batch, so that masks are equal but for a learned bias
    call = theirs if biased else ours
    query = theirs.query
    if theirs.scale != call.scale:
        query = query * (theirs.scale / call.scale)  # one scale for both: heads of another width have another
    return attention_loss(
        query,
        theirs.key,
        ours.query,
        ours.key,
        real,
        _score_mask(call),
        call.is_causal,
        call.scale,
        attention_mask_student=_score_mask(ours) if biased else None,
        softcap=call.softcap,
    )


def _score_mask(call: AttentionCall) -> Tensor | None:
    """One additive or boolean mask for the scores: padding (batch, keys) given room for heads and queries, and bias."""
    mask = call.mask
    if mask is not None and mask.dim() == 2:
        mask = mask.bool()[:, None, None, :]
    if call.window is not None:  # then `mask` is of padding alone
        queries, keys = (torch.arange(one.shape[-2], device=one.device) for one in (call.query, call.key))
        near = (queries[:, None] - keys).abs() < call.window
        mask = near[None, None] if mask is None else mask & near
    if call.position_bias is None:
        return mask
    if mask is None:
        return call.position_bias
    lowest = torch.finfo(call.position_bias.dtype).min
    if mask.dtype == torch.bool:
        return torch.where(mask, call.position_bias, lowest)
    return (call.position_bias + mask).clamp(min=lowest)
