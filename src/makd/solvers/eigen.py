"""Station 3: eigenvalues of symmetric matrices, also of those that an accelerator's library gives up on."""

import logging

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor

from makd.errors import NumericsError
from makd.weights.finite import is_finite

logger = logging.getLogger(__name__)


def eigh(matrix: Float[Tensor, "side side"]) -> tuple[Float[Tensor, " side"], Float[Tensor, "side side"]]:
    """Eigenvalues of a symmetric `matrix`, ascending, and their vectors, as columns, where the matrix is.

    By `torch.linalg.eigh`. Its iteration may not converge where eigenvalues span many orders of magnitude, which is
    told of GPUs more than of CPUs; then by another algorithm (MRRR: Dhillon & Parlett, 2004) in float64 on the CPU.

    Raises:
        NumericsError: `matrix` holds NaN or infinity.
    """
    try:
        energies, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # it has no stub
        if not is_finite(matrix):
            raise NumericsError("A matrix whose eigenvalues are asked for holds NaN or infinity.") from error
        logger.debug("eigh of %d rows on %s did not converge; on the CPU instead", len(matrix), matrix.device)
        found = scipy.linalg.eigh(np.asarray(matrix.double().cpu()), driver="evr")
        energies, vectors = (torch.from_numpy(part).to(matrix) for part in found)
    return energies, vectors


def eigvalsh(matrix: Float[Tensor, "side side"]) -> Float[Tensor, " side"]:
    """The eigenvalues of `eigh`, ascending, without the vectors.

    Raises:
        NumericsError: `matrix` holds NaN or infinity.
    """
    try:
        energies: Tensor = torch.linalg.eigvalsh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # it has no stub
        return eigh(matrix)[0]
    return energies
