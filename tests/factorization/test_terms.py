"""What is kept of a layer's linears, once their moments are gone."""

import pytest
import torch

from makd.anatomy import resolve
from makd.calibration.moments import InputMoments
from makd.calibration.statistics import collect_input_moments
from makd.calibration.store import MemoryStore
from makd.calibration.walk import LayerMoments
from makd.factorization.terms import DecompositionRequest, Terms, _packed, _unpacked
from makd.solvers import SOLVERS, decompose_whitened
from makd.student.linear import dense_weight
from tests.models import batch, tiny


@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_packed_moments_come_back_within_float32_and_exactly_symmetric(size):
    rows = torch.randn(50, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = rows.T @ rows
    packed = _packed(gram)
    assert packed.dtype == torch.float32
    assert packed.numel() == size * (size + 1) // 2
    found = _unpacked(packed)
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, gram, rtol=2**-23, atol=0)


def terms_of(model, most, solver="whitened"):
    terms = Terms(MemoryStore(), model, DecompositionRequest(SOLVERS[solver], (), most, True), torch.device("cpu"))
    inputs = collect_input_moments(model, resolve(model), [batch(model)])
    terms.keep(LayerMoments(resolve(model).linears, inputs))
    return terms, inputs


def test_factors_of_smaller_ranks_are_cut_from_those_that_were_kept():
    model = tiny("bert").double()
    terms, inputs = terms_of(model, None)
    for name in resolve(model).linears[:2]:
        whole = decompose_whitened(dense_weight(model.get_submodule(name)), inputs[name].gram)
        for rank in (1, 5, 9):
            found, expected = terms.factors(name, rank), whole.factors(rank)
            torch.testing.assert_close(found.expand @ found.reduce, expected.expand @ expected.reduce)
            assert found.error == pytest.approx(expected.error)
            assert found.squared_error == pytest.approx(expected.squared_error)


def test_linears_that_stay_dense_are_not_decomposed():
    model = tiny("bert")
    dense, factored, *others = resolve(model).linears
    terms, _ = terms_of(model, {dense: 0, factored: 4, **dict.fromkeys(others, 0)})
    assert f"spectra/{dense}" not in terms.store
    assert terms.store.read(f"factors/{factored}")["reduce"].shape[0] == 4


def test_moments_of_gradients_are_kept_for_solvers_that_fit_later():
    model = tiny("bert")
    name = resolve(model).linears[0]
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    moments = InputMoments(32)
    moments.update(rows)
    wanted = DecompositionRequest(SOLVERS["two_sided_regression"], (), None, False)
    terms = Terms(MemoryStore(), model, wanted, torch.device("cpu"))
    terms.keep(LayerMoments((name,), {}, {name: moments}))
    torch.testing.assert_close(terms.gram(name), moments.gram, rtol=1e-6, atol=1e-9)
    with pytest.raises(KeyError, match="another"):
        terms.gram("another")
