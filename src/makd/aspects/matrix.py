"""The matrix aspect of station 5: the outputs of the linears inside a layer (the paper's matrix distillation)."""

from jaxtyping import Bool, Float
from torch import Tensor

from makd.aspects.hidden import normalised_mse


def matrix_mse(
    student: Float[Tensor, "batch tokens features"],
    teacher: Float[Tensor, "batch tokens features"],
    mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Mean squared difference of one linear's output, in units of the teacher's variance: see `normalised_mse`.

    The unit lets queries, keys, values, up and down projections be added up, though their outputs differ in scale by
    orders of magnitude. 1 is a linear of rank 0 with the best bias. Source: arXiv 2604.03110, matrix distillation;
    the paper's has no unit.
    """
    return normalised_mse(student, teacher, mask)
