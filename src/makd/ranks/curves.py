"""Station 3: spectra thinned to what a person can look at: some ranks, and what each is predicted to lose."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from makd.solvers.factors import Spectrum

POINTS = 48
"""Of a curve, at most, besides those that were asked for."""


@dataclass(frozen=True)
class ErrorCurve:
    """What each rank of a linear, or of several as one, is predicted to lose."""

    name: str
    """Of the linear; of several that were looked at as one, all their names, joined by ` + `."""
    terms: int
    """Of the whole spectrum."""
    ranks: tuple[int, ...]
    """Some of 1..terms, evenly on a logarithmic axis."""
    singular_values: tuple[float, ...]
    """At these ranks, in the solver's own norm."""
    errors: tuple[float, ...]
    """Predicted relative squared error with so many terms kept, in the same norm."""


def thin(name: str, spectrum: Spectrum, wanted: Iterable[int] = ()) -> ErrorCurve:
    """The curve of a spectrum, with `wanted` ranks among its points."""
    terms = len(spectrum.singular_values)
    spread = np.geomspace(1, terms, POINTS).round().astype(int).tolist() if terms else []
    ranks = sorted({*spread, *(rank for rank in wanted if 1 <= rank <= terms)})
    values = spectrum.singular_values.double().cpu()
    left = spectrum.all_squared_errors().double().cpu()
    dropped = float(left[0])
    return ErrorCurve(
        name,
        terms,
        tuple(ranks),
        tuple(float(values[rank - 1]) for rank in ranks),
        tuple(float(left[rank]) / dropped if dropped > 0 else 0.0 for rank in ranks),
    )
