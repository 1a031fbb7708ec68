"""Station 3: how many parameters a student may have, exactly."""

from dataclasses import dataclass

from makd.errors import BudgetError


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A bound on a student's parameters. Exactly one of the three is given; shared parameters count once."""

    params: int | None = None
    """Parameters of the whole student."""
    keep: float | None = None
    """Share of the whole teacher's parameters, in (0, 1]."""
    keep_linears: float | None = None
    """Share of the factorizable linears' parameters (weights and biases), in (0, 1]; the rest stays as it is."""

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            told = ", ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
            raise BudgetError(f"A budget is exactly one of params, keep and keep_linears; got {told}.")
        if self.params is not None and self.params < 1:
            raise BudgetError(f"budget.params is a number of parameters, above 0; got {self.params}.")
        for name in ("keep", "keep_linears"):
            share = given.get(name)
            if share is not None and not 0 < share <= 1:
                raise BudgetError(f"budget.{name} is a share of the teacher's parameters, in (0, 1]; got {share}.")

    def allowance(self, total_parameters: int, linear_parameters: int) -> int:
        """Parameters that the factorizable linears of the student may have together.

        Args:
            total_parameters: of the whole teacher.
            linear_parameters: of its factorizable linears, weights and biases.

        Raises:
            BudgetError: the budget is above the teacher, or does not even cover what is not factorized.
        """
        if self.keep_linears is not None:
            return int(self.keep_linears * linear_parameters + 1e-6)
        budget = self.params if self.params is not None else int((self.keep or 0.0) * total_parameters + 1e-6)
        if budget > total_parameters:
            raise BudgetError(
                f"A budget of {budget:,} parameters is above the teacher, which has {total_parameters:,}. "
                "Give a smaller one."
            )
        rest = total_parameters - linear_parameters
        if budget <= rest:
            raise BudgetError(
                f"A budget of {budget:,} parameters is below the smallest possible student: embeddings, norms and "
                f"heads, which are not factorized, have {rest:,} already. Give a larger one."
            )
        return budget - rest
