"""The square root of second moments: exact where they are sound, with a named ridge where they are not."""

import pytest
import torch

from makd.errors import NumericsError
from makd.solvers.whitened import RIDGE, square_root


def moments(rows, size, seed=0):
    inputs = torch.randn(rows, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return inputs.T @ inputs / rows


def test_sound_moments_come_back_as_they_are():
    gram = moments(100, 12)
    before = gram.clone()
    root, fallback = square_root(gram)
    assert fallback is None
    torch.testing.assert_close(root @ root.T, before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(root, torch.linalg.cholesky(before), rtol=1e-12, atol=1e-12)
    assert torch.equal(gram, before)


def test_fewer_rows_than_directions_get_the_ridge_that_is_named():
    gram = moments(5, 12)
    before = gram.clone()
    root, fallback = square_root(gram)
    assert f"{RIDGE:g} of their mean" in fallback
    wanted = before + RIDGE * before.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(root @ root.T, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(gram, before)


def test_negative_eigenvalues_of_rounding_get_a_larger_ridge():
    gram = moments(100, 12)
    energies, vectors = torch.linalg.eigh(gram)
    energies[0] = -1e-4 * energies.mean()
    root, fallback = square_root((vectors * energies) @ vectors.T)
    assert "0.001 of their mean" in fallback
    assert torch.linalg.eigvalsh(root @ root.T).min() > 0


def test_hopelessly_indefinite_moments_lose_what_is_negative():
    root, fallback = square_root(torch.diag(torch.tensor([30.0, 1.0, -20.0], dtype=torch.float64)))
    assert "1 of their mean" in fallback
    torch.testing.assert_close(
        root @ root.T, torch.diag(torch.tensor([33.6667, 4.6667, 0.0]).double()), rtol=0, atol=1e-4
    )
    assert torch.equal(root, root.tril()), "whoever solves with it takes it to be triangular"
    assert torch.isfinite(torch.linalg.inv(root)).all()


def test_nothing_but_zeros_count_alike():
    root, fallback = square_root(torch.zeros(3, 3))
    assert "zero in all" in fallback
    assert torch.equal(root, torch.eye(3, dtype=torch.float64))


def test_what_is_not_finite_is_told():
    with pytest.raises(NumericsError, match="of my inputs hold NaN"):
        square_root(torch.full((2, 2), float("nan")), "my inputs")


def test_a_factor_with_nan_is_no_factor_even_where_it_is_called_a_success(monkeypatch):
    """As CUDA's Cholesky does with a last pivot below zero."""
    exact = torch.linalg.cholesky_ex

    def cholesky_ex(matrix, *, out):
        factor, failed_at = exact(matrix)
        if int(failed_at) == len(matrix):
            factor[-1, -1], failed_at = torch.nan, torch.zeros_like(failed_at)
        out[0].copy_(factor)
        out[1].copy_(failed_at)

    inputs = torch.randn(100, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs -= inputs.mean(dim=1, keepdim=True)  # as behind a norm: all directions but one
    gram = inputs.T @ inputs
    monkeypatch.setattr(torch.linalg, "cholesky_ex", cholesky_ex)
    root, fallback = square_root(gram)
    assert "not positive definite" in fallback
    torch.testing.assert_close(root @ root.T, gram, rtol=0, atol=1e-5 * float(gram.diagonal().mean()))
