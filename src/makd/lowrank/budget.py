"""Station 3: how many parameters a student may have, exactly."""

import math
from dataclasses import dataclass
from fractions import Fraction

from makd.errors import BudgetError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A bound on a student's parameters. Exactly one of the three is given; shared parameters count once.

    Raises:
        BudgetError: none or several are given, or the one that is given is out of its range.
    """

    params: int | None = None
    """Parameters of the whole student, at least 1."""
    keep: float | None = None
    """Share of the whole teacher's parameters, in (0, 1]."""
    keep_linears: float | None = None
    """Share of the factorizable linears' parameters (weights and biases), in (0, 1]; the rest stays as it is."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            told = ", ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
            raise BudgetError(f"A budget is exactly one of params, keep and keep_linears; got {told}.")
        if self.params is not None and (self.params != int(self.params) or self.params < 1):
            raise BudgetError(f"budget.params is a whole number of parameters, above 0; got {self.params}.")
        for name in ("keep", "keep_linears"):
            share = given.get(name)
            if share is not None and not 0 < share <= 1:
                raise BudgetError(f"budget.{name} is a share of the teacher's parameters, in (0, 1]; got {share}.")

    def allowance(self, total_parameters: int, linear_parameters: int, smallest_linears: int = 1) -> int:
        """Parameters that the factorizable linears of the student may have together, weights and biases.

        Args:
            total_parameters: of the whole teacher.
            linear_parameters: of its factorizable linears, weights and biases.
            smallest_linears: the least that they can have: `makd.lowrank.ranks.smallest_parameters`, rank 1 everywhere.

        Raises:
            BudgetError: the budget is above the teacher, or below the smallest student.
            ValueError: the linears have more parameters than the teacher.
        """
        if not 0 <= linear_parameters <= total_parameters:
            raise ValueError(f"{linear_parameters:,} parameters of linears are not part of {total_parameters:,}.")
        rest = total_parameters - linear_parameters
        if self.keep_linears is not None:
            budget = rest + _floor(self.keep_linears, linear_parameters)
        elif self.keep is not None:
            budget = _floor(self.keep, total_parameters)
        else:
            budget = self.params or 0
        if budget > total_parameters:
            raise BudgetError(
                f"A budget of {budget:,} parameters is above the teacher, which has {total_parameters:,}. "
                f"Give one from {rest + smallest_linears:,} to {total_parameters:,}."
            )
        if budget < rest + smallest_linears:
            raise BudgetError(
                f"A budget of {budget:,} parameters is below the smallest possible student, rank 1 everywhere: "
                f"embeddings, norms and heads, which are not factorized, have {rest:,}, and the factors at least "
                f"{smallest_linears:,}. Give one from {rest + smallest_linears:,} to {total_parameters:,}."
            )
        return budget - rest


def _floor(share: float, parameters: int) -> int:
    """`share` as it was written, times `parameters`, rounded down: 0.29 of 100 is 29, though 0.29 * 100 < 29."""
    return math.floor(Fraction(repr(float(share))) * parameters)
