"""Solvers: weight and statistics -> a decomposition, from which factors of any rank are cut. Pure tensor functions."""

from makd.extensions import Extensible
from makd.solvers.factors import Decomposition
from makd.solvers.fisher import decompose_fisher
from makd.solvers.kind import Decompose, Solver, why_not
from makd.solvers.regression import choose_ridge, decompose_regression, fit_regression
from makd.solvers.svd import decompose_svd
from makd.solvers.two_sided import decompose_two_sided, spectra_two_sided
from makd.solvers.whitened import decompose_whitened

SOLVERS: Extensible[Solver] = Extensible(
    "solver",
    {
        "svd": Solver(
            "truncated SVD of the weight; needs no text",
            decompose=lambda weight, inputs, gradients, rank: decompose_svd(weight, rank),
        ),
        "fisher": Solver(
            "the same, rows weighted by what the model makes of the outputs (FWSVD)",
            gradients=True,
            decompose=lambda weight, inputs, gradients, rank: decompose_fisher(weight, gradients, rank),
        ),
        "whitened": Solver(
            "smallest error of the outputs on the calibration text",
            inputs=True,
            decompose=lambda weight, inputs, gradients, rank: decompose_whitened(weight, inputs, rank),
        ),
        "two_sided": Solver(
            "`whitened`, weighted by what the model makes of the outputs",
            inputs=True,
            gradients=True,
            one_unit=True,
            decompose=decompose_two_sided,
        ),
        "regression": Solver("the teacher's outputs from the student's own inputs", inputs=True, in_forward_order=True),
        "two_sided_regression": Solver(
            "regression, weighted by what the model makes of the outputs",
            inputs=True,
            gradients=True,
            in_forward_order=True,
            one_unit=True,
        ),
    },
    group="makd.solvers",
    accepts=Solver,
    why_not=why_not,
)
"""makd's own, and those of users' packages: entry points of the group `makd.solvers`."""

__all__ = [
    "SOLVERS",
    "Decompose",
    "Decomposition",
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
