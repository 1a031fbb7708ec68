"""Solvers: weight and statistics -> a decomposition, from which factors of any rank are cut. Pure tensor functions."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from makd.lowrank.factors import Decomposition
from makd.lowrank.moments import InputMoments
from makd.lowrank.solvers.svd import decompose_svd
from makd.lowrank.solvers.whitened import decompose_whitened
from makd.registry import Registry


@dataclass(frozen=True)
class Solver:
    """A way from a weight to its terms."""

    summary: str
    decompose: Callable[[Float[Tensor, "out inp"], InputMoments | None], Decomposition]
    """Weight, and the moments of its inputs if `needs_moments`."""
    needs_moments: bool


def _whitened(weight: Float[Tensor, "out inp"], moments: InputMoments | None) -> Decomposition:
    if moments is None:
        raise ValueError("The whitened solver needs the moments of the inputs.")
    return decompose_whitened(weight, moments.gram.to(weight.device))


SOLVERS: Registry[Solver] = Registry(
    "solver",
    {
        "svd": Solver("truncated SVD of the weight; needs no text", lambda weight, _: decompose_svd(weight), False),
        "whitened": Solver("smallest error of the outputs on the calibration text", _whitened, True),
    },
)

__all__ = ["SOLVERS", "Solver", "decompose_svd", "decompose_whitened"]
