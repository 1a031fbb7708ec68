"""Operations that are counted before they are done are those that torch then counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from makd.anatomy import resolve
from makd.calibration.moments import CrossMoments
from makd.factorization.assemble import linear_sizes
from makd.forecasting import operations
from makd.forecasting.operations import LayerShape, Operations, TextShape
from makd.forecasting.shapes import shape_of
from makd.ranks.allocation import LinearSize
from makd.solvers import (
    SOLVERS,
    choose_ridge,
    decompose_fisher,
    decompose_svd,
    decompose_two_sided,
    decompose_whitened,
    fit_regression,
)
from tests.forecasting.measured import counted
from tests.models import tiny

TEXT = TextShape(((3, 10),))


def shape(model):
    anatomy = resolve(model)
    return shape_of(model, anatomy, linear_sizes(model, anatomy))


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_forward_has_the_products_that_torch_counts(family):
    model = tiny(family)
    model.set_attn_implementation("eager")  # whose products are all seen
    ids = torch.randint(3, 60, (3, 10))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    found = counter.get_flop_counts()
    layers = [found[f"{type(model).__name__}.{layer.module}"] for layer in resolve(model).layers]
    counted = [operations.forward(layer, TEXT).products for layer in shape(model).layers]
    assert counted == [sum(layer.values()) for layer in layers]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_a_backward_to_the_inputs_has_the_products_that_torch_counts(family):
    model = tiny(family).requires_grad_(False)
    model.set_attn_implementation("eager")
    states = model.get_input_embeddings()(torch.randint(3, 60, (3, 10))).requires_grad_()

    def forward():
        return model(inputs_embeds=states, attention_mask=torch.ones(3, 10, dtype=torch.long))[0]

    both, alone = counted(lambda: forward().sum().backward()), counted(forward)
    assert sum(operations.backward(layer, TEXT).products for layer in shape(model).layers) == both - alone


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gram(size):
    rows = random(4 * size, size)
    return rows.T @ rows / len(rows)


DECOMPOSED = {
    "svd": lambda weight, rank, inputs, gradients: decompose_svd(weight, rank),
    "fisher": lambda weight, rank, inputs, gradients: decompose_fisher(weight, gradients, rank),
    "whitened": lambda weight, rank, inputs, gradients: decompose_whitened(weight, inputs, rank),
    "two_sided": lambda weight, rank, inputs, gradients: decompose_two_sided(weight, inputs, gradients, rank),
}


EXACTLY, NEARLY = 1e-9, 0.06
"""How far a count may be off: where only the leading directions are looked for, small products are left out of it."""
SHAPES = [
    (60, 80, None, EXACTLY), (80, 60, None, EXACTLY), (40, 160, 20, EXACTLY), (160, 40, 20, EXACTLY),
    (60, 80, 20, NEARLY), (80, 60, 20, NEARLY),
]  # fmt: skip
"""Outputs, inputs, rank."""


@pytest.mark.parametrize("solver", DECOMPOSED)
@pytest.mark.parametrize(("out", "features", "rank", "off"), SHAPES)
def test_a_decomposition_has_the_operations_that_it_then_takes(solver, out, features, rank, off):
    weight, moments = random(out, features), {"inputs": gram(features), "gradients": gram(out)}
    found = operations.decomposition(SOLVERS[solver], [out], features, rank)
    taken = counted(lambda: DECOMPOSED[solver](weight, rank, **moments))
    assert found.single + found.double == pytest.approx(taken, rel=off)


@pytest.mark.parametrize("solver", ["regression", "two_sided_regression"])
@pytest.mark.parametrize(("out", "features", "rank", "off"), [shape for shape in SHAPES if shape[2]])
def test_a_regression_has_the_operations_that_it_then_takes(solver, out, features, rank, off):
    weight, inputs = random(out, features), random(400, features)
    moments = CrossMoments(features, out)
    moments.update_pairs(inputs, inputs @ weight.T)
    gradients = gram(out) if SOLVERS[solver].gradients else None

    def fit():
        ridge = choose_ridge(weight, moments, moments, gradient_gram=gradients)
        fit_regression(weight, moments, rank, gradient_gram=gradients, ridge=ridge)

    found = operations.regression(SOLVERS[solver], [out], features, rank)
    assert found.single + found.double == pytest.approx(counted(fit), rel=off)


def test_moments_take_the_square_of_what_a_linear_reads_and_writes():
    size = LinearSize("up", 30, 20, has_bias=False)
    layer = LayerShape(((size,),))
    assert operations.input_moments(layer, TEXT).single == 2 * 30 * 20**2
    assert operations.gradient_moments(layer, TEXT).single == 2 * 30 * 30**2
    assert operations.cross_moments(layer, TEXT).single == 2 * 30 * (20**2 + 20 * 30)


def test_linears_that_read_the_same_input_have_its_moments_once():
    sizes = tuple(LinearSize(name, 20, 20, has_bias=False) for name in "qkv")
    together, apart = LayerShape((sizes,)), LayerShape(tuple((size,) for size in sizes))
    assert operations.input_moments(apart, TEXT).single == 3 * operations.input_moments(together, TEXT).single
    assert operations.cross_moments(together, TEXT).single == 2 * 30 * (20**2 + 20 * 60)


def test_eigenvectors_are_of_the_smaller_side_or_of_the_terms_that_are_asked_for():
    whole = operations.decomposition(SOLVERS["whitened"], [300], 200, None)
    few = operations.decomposition(SOLVERS["whitened"], [300], 200, 40)
    assert whole.eigen == {200: 1}
    assert few.eigen == {48: 2}
    assert operations.decomposition(SOLVERS["whitened"], [300], 200, 180).eigen == {200: 1}


def test_work_adds_up():
    one = Operations(products=1.0, eigen={8: 1.0})
    both = one + Operations(products=2.0, single=3.0, eigen={8: 1.0, 9: 2.0})
    assert both == Operations(products=3.0, single=3.0, eigen={8: 2.0, 9: 2.0})
    assert both.times(2) == Operations(products=6.0, single=6.0, eigen={8: 4.0, 9: 4.0})
