"""Station 3: what a solver is: which statistics it looks at, and its function of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from makd.errors import ExtensionError
from makd.extensions import asked
from makd.solvers.factors import Decomposition
from makd.weights.finite import is_finite

Decompose = Callable[[Tensor, Any, Any, int | None], Decomposition]
"""(weight (out, in), second moments of the inputs (in, in) or None, second moments of the output gradients: a list of
(out, out), one for each of the linears that are stacked in `weight`, empty where they are not looked at, and how many
terms are asked for or None for all) -> the weight as a sum of rank-1 terms. The dtypes are float64 for moments and the
teacher's for the weight. It is called from several threads."""


@dataclass(frozen=True)
class Solver:
    """What a solver looks at, and what it makes of it. More of it costs more calibration, and gives a better start."""

    summary: str
    inputs: bool = False
    """Second moments of each linear's inputs: one forward of the calibration text."""
    gradients: bool = False
    """Second moments of its output gradients: a backward besides."""
    in_forward_order: bool = False
    """The student's own inputs, layer after layer, with the teacher's outputs as targets; biases are refitted. Only
    makd's own solvers are."""
    one_unit: bool = False
    """Whether squared errors of all linears are in one unit, so that ranks can be shared out by them: `ranks: auto` is
    `global` then, and `uniform` otherwise."""
    decompose: Decompose | None = None
    """Makes the terms of one linear; None with `in_forward_order`, where factors are regressions."""

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is needed at all."""
        return self.inputs or self.gradients or self.in_forward_order


def why_not(name: str, solver: Solver) -> str | None:
    """What is wrong with a user's solver."""
    if solver.in_forward_order:
        return "only makd's own solvers are in_forward_order"
    if not callable(solver.decompose):
        return "its `decompose` is no function"
    return None


def decompose(
    name: str, solver: Solver, weight: Tensor, inputs: Tensor | None, gradients: Sequence[Tensor], rank: int | None
) -> Decomposition:
    """What the solver called `name` makes of a linear. Arguments are those of `Decompose`.

    Raises:
        ExtensionError: a user's solver fails, or gives no decomposition of this weight.
        NumericsError: weight or moments hold NaN or infinity.
    """
    assert solver.decompose is not None  # a solver in forward order is not asked
    if not name:
        return solver.decompose(weight, inputs, gradients, rank)
    found = asked(f"Solver {name!r}", solver.decompose, weight, inputs, gradients, rank)
    reason = _why_none(found, weight, rank)
    if reason is not None:
        raise ExtensionError(f"Solver {name!r} gave no decomposition of a weight of {tuple(weight.shape)}: {reason}.")
    return found


def _why_none(found: object, weight: Tensor, rank: int | None) -> str | None:
    if not isinstance(found, Decomposition):
        return f"it is a {type(found).__name__}, not a makd.solvers.Decomposition"
    values, terms = found.singular_values, len(found.singular_values)
    outs, ins = weight.shape
    least = min(outs, ins) if rank is None else min(outs, ins, rank)
    if found.left.shape != (outs, terms) or found.right.shape != (terms, ins):
        shapes = f"{tuple(found.left.shape)} and {tuple(found.right.shape)}"
        return f"left and right are (out, terms) and (terms, in), with as many terms as singular values; got {shapes}"
    if terms < least:
        return f"{least} terms were asked for, and it has {terms}"
    if found.squared_errors is not None and len(found.squared_errors) != terms + 1:
        return f"squared_errors are of ranks 0 to {terms}; there are {len(found.squared_errors)}"
    if not all(is_finite(part) for part in (found.left, found.right, values)):
        return "a number in it is NaN or infinite"
    if bool((values < 0).any()) or bool((values[1:] > values[:-1] * (1 + 1e-6)).any()):
        return "its singular values do not descend from the largest to 0"
    if found.dtype != weight.dtype:
        return f"its dtype is {found.dtype}, the weight's is {weight.dtype}"
    return None
