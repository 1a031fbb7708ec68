"""Station 3: how many parameters a student may have, exactly."""

import math
from dataclasses import dataclass
from fractions import Fraction

from makd.errors import BudgetError
from makd.kinds import checked


@dataclass(frozen=True, kw_only=True)
@checked("budget")
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
    """Share of the linears' parameters (weights and biases), in (0, 1]; the rest stays as it is. Routed experts are
    linears too; where they stay dense, the others have to make up for them."""

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

    def limit(self, total_parameters: int, linear_parameters: int, expert_parameters: int = 0) -> int:
        """Parameters that the whole student may have; may be out of reach.

        Args:
            total_parameters: of the whole teacher.
            linear_parameters: of its factorizable linears, weights and biases.
            expert_parameters: of its routed experts that stay dense; they are linears too.

        Raises:
            ValueError: the linears have more parameters than the teacher.
        """
        linears = linear_parameters + expert_parameters
        if not 0 <= linears <= total_parameters:
            raise ValueError(f"{linears:,} parameters of linears are not part of {total_parameters:,}.")
        if self.keep_linears is not None:
            return total_parameters - linears + _floor(self.keep_linears, linears)
        return _floor(self.keep, total_parameters) if self.keep is not None else self.params or 0

    @staticmethod
    def check(
        limit: int,
        total: int,
        rest: int,
        smallest: int,
        how: str = "rank 1 everywhere",
        advice: str = "",
        experts: int = 0,
    ) -> None:
        """Refuse a budget of `limit` parameters that no student can meet.

        Args:
            limit: what the student may have.
            total: what the teacher has.
            rest: what is not factorized.
            smallest: what the smallest student has, all in all.
            how: how it is made.
            advice: how to go lower, if there is a way.
            experts: what of `rest` is routed experts'.

        Raises:
            BudgetError: the budget is above the teacher, or below the smallest student.
        """
        if limit > total:
            raise BudgetError(
                f"A budget of {limit:,} parameters is above the teacher, which has {total:,}. "
                f"Give one from {smallest:,} to {total:,}."
            )
        if limit < smallest:
            of_experts = f" ({experts:,} of them are routed experts', which stay dense)" if experts else ""
            raise BudgetError(
                f"A budget of {limit:,} parameters is below the smallest possible student, {how}: norms, "
                f"embeddings, heads and whatever else is not factorized have {rest:,}{of_experts}, and the factors at "
                f"least {smallest - rest:,}. Give one from {smallest:,} to {total:,}.{advice}"
            )


def _floor(share: float, parameters: int) -> int:
    """`share` as it was written, times `parameters`, rounded down: 0.29 of 100 is 29, though 0.29 * 100 < 29."""
    return math.floor(Fraction(repr(float(share))) * parameters)
