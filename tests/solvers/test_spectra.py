"""Singular values alone, for choosing ranks by, are those of whole decompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from makd.errors import NumericsError
from makd.solvers import decompose_two_sided, decompose_whitened, spectrum_two_sided, spectrum_whitened

SIZES = st.integers(1, 12)


def draw(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(size, seed, rows=30):
    mixed = draw(rows, size, seed) @ draw(size, size, seed + 1)
    return mixed.T @ mixed / rows


@settings(max_examples=40, deadline=None)
@given(out=SIZES, inp=SIZES, seed=st.integers(0, 20), rows=st.sampled_from([2, 30]))
def test_whitened(out, inp, seed, rows):
    weight, inputs = draw(out, inp, seed), gram(inp, seed + 50, rows)
    whole, (values, fallback) = decompose_whitened(weight, inputs), spectrum_whitened(weight, inputs)
    torch.testing.assert_close(values, whole.singular_values, rtol=1e-6, atol=1e-6 * float(values.max()))
    assert fallback == whole.fallback


@settings(max_examples=40, deadline=None)
@given(outs=st.lists(SIZES, min_size=1, max_size=3), inp=SIZES, seed=st.integers(0, 20))
def test_two_sided_of_one_linear_and_of_several_as_one(outs, inp, seed):
    weight, inputs = draw(sum(outs), inp, seed), gram(inp, seed + 50)
    outputs = [gram(out, seed + 60 + number) for number, out in enumerate(outs)]
    whole = decompose_two_sided(weight, inputs, outputs)
    values, fallback = spectrum_two_sided(weight, inputs, outputs)
    torch.testing.assert_close(values, whole.singular_values, rtol=1e-6, atol=1e-6 * float(values.max()))
    assert fallback == whole.fallback


def test_what_is_not_finite_is_refused():
    with pytest.raises(NumericsError, match="weight holds NaN"):
        spectrum_whitened(torch.full((2, 2), float("nan")), torch.eye(2))
    with pytest.raises(NumericsError, match="gradients of its outputs hold NaN"):
        spectrum_two_sided(torch.ones(2, 2), torch.eye(2), torch.full((2, 2), float("nan")))
