"""Eigenvalues of symmetric matrices, also where the first algorithm gives up."""

import pytest
import torch

from makd.errors import NumericsError
from makd.solvers.eigen import eigh


def gives_up(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_an_algorithm_does_not_converge_another_one_finds_the_eigenvalues(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    rows = torch.randn(12, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    matrix = rows @ rows.T  # 4 of 12 eigenvalues are 0
    known = torch.linalg.eigvalsh(matrix.double())
    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    energies, vectors = eigh(matrix)
    assert energies.dtype == vectors.dtype == dtype
    digits = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(energies.double(), known, atol=digits * float(known.max()), rtol=0)
    rebuilt = (vectors * energies) @ vectors.T
    torch.testing.assert_close(rebuilt, matrix, atol=digits * float(known.max()), rtol=0)


def test_a_matrix_with_nan_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    with pytest.raises(NumericsError, match="NaN or infinity"):
        eigh(torch.full((3, 3), torch.nan))
