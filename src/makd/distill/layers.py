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

from makd.anatomy import Anatomy, Role
from makd.anatomy.tokens import by_token, completion_tokens, layer_tokens, role_tokens
from makd.aspects import ActivePlan, Comparison, attention_loss, cosine_distance, normalised_mse, relation_kl
from makd.capture import AttentionCall, Recording, Tap
from makd.distill.projections import Projections


class LayerLosses(dict[Comparison, Float[Tensor, ""]]):
    """Loss of every comparison that the student has reached so far: of an aspect, at one layer, for one role."""

    def __init__(
        self,
        anatomy: Anatomy,
        inputs: Mapping[str, Tensor],
        teacher: Recording,
        plan: ActivePlan,
        projections: Projections | None = None,
    ) -> None:
        """Nothing is compared yet.

        Args:
            anatomy: of the student.
            inputs: the batch that both models read.
            teacher: what the teacher's forward left, without gradients. It is emptied on the way.
            plan: what is compared with what.
            projections: take the student's states to the teacher's width, where that differs.
        """
        super().__init__()
        self.anatomy, self.inputs, self.teacher, self.projections = anatomy, inputs, teacher, projections
        self._wanted: dict[Tap, list[Comparison]] = {}
        for comparison in plan.comparisons:
            self._wanted.setdefault(comparison.tap, []).append(comparison)
        self._due = Counter(comparison.teacher for comparison in plan.comparisons)
        self._known: dict[tuple[str, bool], tuple[Tensor, bool]] = {}

    def receive(self, tap: Tap, ours: Tensor | AttentionCall) -> None:
        """Compare what the student has at a tap, which is a `capture` receiver."""
        real, everywhere = self._tokens(tap)
        for comparison in self._wanted[tap]:
            self._due[comparison.teacher] -= 1
            is_last = self._due[comparison.teacher] == 0
            if isinstance(ours, AttentionCall):
                calls = self.teacher.attention
                call = calls.pop(comparison.teacher) if is_last else calls[comparison.teacher]
                self[comparison] = _attention(call, ours, self._counted(comparison, real, everywhere))
                continue
            tensors = self.teacher.tensors
            theirs = tensors.pop(comparison.teacher) if is_last else tensors[comparison.teacher]
            counted = self._counted(comparison, real, everywhere)
            self[comparison] = self._states(comparison, ours, theirs, real, counted, everywhere)

    def _counted(
        self, comparison: Comparison, real: Bool[Tensor, "batch tokens"], everywhere: bool
    ) -> Bool[Tensor, "batch tokens"] | None:
        """The tokens that a comparison is a mean over; None where that is all of them."""
        if comparison.tokens == "first":
            return real & (real.cumsum(1) == 1)
        if comparison.tokens == "completion":
            return real & completion_tokens(self.inputs)
        return None if everywhere else real

    def _states(
        self,
        comparison: Comparison,
        ours: Tensor,
        theirs: Tensor,
        real: Tensor,
        counted: Tensor | None,
        everywhere: bool,
    ) -> Float[Tensor, ""]:
        # OPT joins rows before its feed-forward: every tensor is given its (batch, tokens) back
        student, teacher = (by_token(side, real, f"What layer {comparison.tap.layer} gives") for side in (ours, theirs))
        if comparison.measure == "relation":
            return relation_kl(student, teacher, None if everywhere else real, comparison.heads, counted)
        if self.projections is not None:
            student = self.projections.apply_to(comparison.tap, student)
        measure = cosine_distance if comparison.measure == "cosine" else normalised_mse
        return measure(student, teacher, counted)

    def _tokens(self, tap: Tap) -> tuple[Bool[Tensor, "batch tokens"], bool]:
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


def _attention(
    theirs: AttentionCall, ours: AttentionCall, real: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, ""]:
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
    if call.position_bias is None:
        return mask
    if mask is None:
        return call.position_bias
    lowest = torch.finfo(call.position_bias.dtype).min
    if mask.dtype == torch.bool:
        return torch.where(mask, call.position_bias, lowest)
    return (call.position_bias + mask).clamp(min=lowest)
