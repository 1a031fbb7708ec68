"""The relation aspect of station 5: how similar a text's tokens are to each other, by their queries, keys or values.

Self-relations do not depend on the width of what they are made of, so that a narrower student is compared without any
projection. Sources: MiniLM (arXiv 2002.10957), of values; MiniLMv2 (arXiv 2012.15828), of queries, keys and values.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from makd.aspects.attention_mean import attention_loss


def relation_kl(
    student: Float[Tensor, "batch tokens channels"],
    teacher: Float[Tensor, "batch tokens teacher_channels"],
    mask: Bool[Tensor, "batch tokens"] | None,
    heads: int,
    queries: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """KL(R_teacher ‖ R_student), mean over heads and real tokens, in nats; R = softmax(X Xᵀ / √d) over real tokens.

    X is a head's part of the channels, d its width. That is attention of X on itself, so `attention_loss` makes it a
    tile at a time: nothing of shape (tokens, tokens) is kept. d KL / d X is the sum of the gradients of X as query and
    as key.

    Args:
        student: outputs of a linear; may hold anything at padding, NaN included, and so may `teacher`.
        teacher: of another width, maybe; gets no gradient.
        mask: True at real tokens; None where all are. With none, the loss is 0.
        heads: parts that the channels are cut into, on both sides.
        queries: True at the tokens whose similarities count, to all real ones; None takes `mask`.

    Returns:
        A scalar of float32 (float64 for float64 inputs).

    Raises:
        ValueError: `heads` does not divide both widths.
    """
    if student.shape[-1] % heads or teacher.shape[-1] % heads:
        raise ValueError(
            f"{heads} relation heads do not divide the student's {student.shape[-1]} channels and the teacher's "
            f"{teacher.shape[-1]}."
        )

    def split(states: Tensor) -> Tensor:
        # padding is masked as a key, but enters products all the same
        known = states if mask is None else torch.where(mask.unsqueeze(-1), states, 0)
        heads_first: Tensor = known.unflatten(-1, (heads, -1)).transpose(1, 2)
        return heads_first

    ours, theirs = split(student), split(teacher.detach())
    counted = mask if queries is None else queries
    return attention_loss(theirs, theirs, ours, ours, counted, None if mask is None else mask[:, None, None, :])
