"""Singular values alone, for choosing ranks by, are those of whole decompositions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from makd.errors import NumericsError
from makd.solvers import decompose_two_sided, decompose_whitened, spectra_two_sided

SIZES = st.integers(1, 12)


def draw(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(size, seed, rows=30):
    mixed = draw(rows, size, seed) @ draw(size, size, seed + 1)
    return mixed.T @ mixed / rows


@settings(max_examples=40)
@given(out=SIZES, inp=SIZES, seed=st.integers(0, 20), rows=st.sampled_from([2, 30]))
def test_without_gradients_they_are_those_of_whitened(out, inp, seed, rows):
    weight, inputs = draw(out, inp, seed), gram(inp, seed + 50, rows)
    whole, found = decompose_whitened(weight, inputs), spectra_two_sided({"a": weight}, inputs, {})[("a",)]
    values = found.singular_values
    torch.testing.assert_close(values, whole.singular_values, rtol=1e-6, atol=1e-6 * float(values.max()))
    assert found.fallback == whole.fallback


@settings(max_examples=40)
@given(outs=st.lists(SIZES, min_size=1, max_size=3), inp=SIZES, seed=st.integers(0, 20))
def test_two_sided_of_each_linear_and_of_several_as_one(outs, inp, seed):
    inputs = gram(inp, seed + 50)
    weights = {str(number): draw(out, inp, seed + number) for number, out in enumerate(outs)}
    outputs = {str(number): gram(out, seed + 60 + number) for number, out in enumerate(outs)}
    found = spectra_two_sided(weights, inputs, outputs, [tuple(weights)])
    for names in (*((name,) for name in weights), tuple(weights)):
        stacked = torch.cat([weights[name] for name in names])
        whole = decompose_two_sided(stacked, inputs, [outputs[name] for name in names])
        values = found[names].singular_values
        torch.testing.assert_close(values, whole.singular_values, rtol=1e-6, atol=1e-6 * float(values.max()))
        assert found[names].fallback == whole.fallback


def test_what_is_not_finite_is_refused():
    with pytest.raises(NumericsError, match="weight holds NaN"):
        spectra_two_sided({"a": torch.full((2, 2), float("nan"))}, torch.eye(2), {})
    with pytest.raises(NumericsError, match="gradients of its outputs hold NaN"):
        spectra_two_sided({"a": torch.ones(2, 2)}, torch.eye(2), {"a": torch.full((2, 2), float("nan"))})
