"""Solvers: weight and statistics -> a decomposition, from which factors of any rank are cut. Pure tensor functions."""

from dataclasses import dataclass

from makd.registry import Registry
from makd.solvers.fisher import decompose_fisher
from makd.solvers.regression import choose_ridge, decompose_regression, fit_regression
from makd.solvers.svd import decompose_svd
from makd.solvers.two_sided import decompose_two_sided, spectra_two_sided
from makd.solvers.whitened import decompose_whitened


@dataclass(frozen=True)
class Solver:
    """What a solver looks at. More of it costs more calibration, and gives a better start."""

    summary: str
    inputs: bool = False
    """Second moments of each linear's inputs: one forward of the calibration text."""
    gradients: bool = False
    """Second moments of its output gradients: a backward besides."""
    in_forward_order: bool = False
    """The student's own inputs, layer after layer, with the teacher's outputs as targets; biases are refitted."""

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is needed at all."""
        return self.inputs or self.gradients or self.in_forward_order


SOLVERS: Registry[Solver] = Registry(
    "solver",
    {
        "svd": Solver("truncated SVD of the weight; needs no text"),
        "fisher": Solver("the same, rows weighted by what the model makes of the outputs (FWSVD)", gradients=True),
        "whitened": Solver("smallest error of the outputs on the calibration text", inputs=True),
        "two_sided": Solver("`whitened`, weighted by what the model makes of the outputs", inputs=True, gradients=True),
        "regression": Solver("the teacher's outputs from the student's own inputs", inputs=True, in_forward_order=True),
        "two_sided_regression": Solver(
            "regression, weighted by what the model makes of the outputs",
            inputs=True,
            gradients=True,
            in_forward_order=True,
        ),
    },
)

__all__ = [
    "SOLVERS",
    "Solver",
    "choose_ridge",
    "decompose_fisher",
    "decompose_regression",
    "decompose_svd",
    "decompose_two_sided",
    "decompose_whitened",
    "fit_regression",
    "spectra_two_sided",
]
