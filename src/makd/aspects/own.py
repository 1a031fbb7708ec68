"""Station 5: the losses of users' aspects, held to what every aspect promises."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from makd.aspects.table import ASPECTS
from makd.errors import ExtensionError
from makd.extensions import asked


def own_loss(
    name: str,
    student: Float[Tensor, "batch tokens channels"],
    teacher: Float[Tensor, "batch tokens channels"],
    mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """The loss of the user's aspect `name` at one place of one batch.

    Args:
        name: of the aspect.
        student: a layer's or a linear's output; may hold anything where `mask` is False, and so may `teacher`.
        teacher: gets no gradient.
        mask: True at the tokens that count. Where none does, the loss is 0, and the aspect is not asked.

    Raises:
        ExtensionError: the aspect fails, or returns no scalar, or one that the student cannot learn from.
    """
    function = ASPECTS[name].loss
    assert function is not None  # `why_not` saw to it
    if not bool(mask.any()):
        return student[:0].sum().float()
    with torch.autocast(student.device.type, enabled=False):
        found = asked(f"The loss of aspect {name!r}", function, student, teacher.detach(), mask)
    if not isinstance(found, Tensor) or found.dim() or not found.is_floating_point():
        met = f"a tensor {tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
        raise ExtensionError(f"The loss of aspect {name!r} is a scalar of floating point; got {met}.")
    if student.requires_grad and not found.requires_grad:
        raise ExtensionError(
            f"The loss of aspect {name!r} does not depend on the student by anything that has a gradient: nothing "
            "would be learned from it. Compute it of the first argument, in torch, without detach() or no_grad()."
        )
    return found.to(torch.promote_types(found.dtype, torch.float32))
