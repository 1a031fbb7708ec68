"""Station 7: the losses inside the layers, each made as soon as both sides are there.

The teacher's forward comes first and is recorded. Then, while the student's runs, every tensor that it hands over is
compared with the teacher's on the spot, and the teacher's is let go: after the student's forward nothing is left of a
recording but the losses, and what their backward needs.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from makd.anatomy import Anatomy, Role
from makd.anatomy.tokens import layer_tokens, role_tokens
from makd.aspects import attention_loss, normalised_mse
from makd.capture import AttentionCall, Recording, Tap


class LayerLosses(dict[Tap, Float[Tensor, ""]]):
    """Loss of every tap that the student has reached so far: of an aspect, at one layer, for one role."""

    def __init__(self, anatomy: Anatomy, inputs: Mapping[str, Tensor], teacher: Recording) -> None:
        """Nothing is compared yet.

        Args:
            anatomy: of the student; the teacher's has the same layers and roles.
            inputs: the batch that both models read.
            teacher: what the teacher's forward left, without gradients. It is emptied on the way.
        """
        super().__init__()
        self.anatomy, self.inputs, self.teacher = anatomy, inputs, teacher
        self._known: dict[tuple[str, bool], tuple[Tensor, bool]] = {}

    def receive(self, tap: Tap, ours: Tensor | AttentionCall) -> None:
        """Compare what the student has at a tap, which is a `capture` receiver."""
        real, everywhere = self._tokens(tap)
        counted = None if everywhere else real
        if isinstance(ours, AttentionCall):
            self[tap] = _attention(self.teacher.attention.pop(tap), ours, counted)
            return
        # OPT joins rows before its feed-forward: every tensor is given its (batch, tokens) back
        student, teacher = (side.reshape(*real.shape, -1) for side in (ours, self.teacher.tensors.pop(tap)))
        self[tap] = normalised_mse(student, teacher, counted)

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
    return attention_loss(
        theirs.query,
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
