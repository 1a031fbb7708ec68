"""Operations that are counted before they are done are those that torch then counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from makd.anatomy import resolve
from makd.factorization.assemble import linear_sizes
from makd.forecasting import operations
from makd.forecasting.operations import LayerShape, Operations, TextShape
from makd.forecasting.shapes import shape_of
from makd.ranks.allocation import LinearSize
from makd.solvers import SOLVERS
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


def test_moments_take_the_square_of_what_a_linear_reads_and_writes():
    size = LinearSize("up", 30, 20, has_bias=False)
    layer = LayerShape(((size,),))
    assert operations.input_moments(layer, TEXT).single == 2 * 30 * 20**2
    assert operations.gradient_moments(layer, TEXT).single == 2 * 30 * 30**2


def test_linears_that_read_the_same_input_have_its_moments_once():
    sizes = tuple(LinearSize(name, 20, 20, has_bias=False) for name in "qkv")
    together, apart = LayerShape((sizes,)), LayerShape(tuple((size,) for size in sizes))
    assert operations.input_moments(apart, TEXT).single == 3 * operations.input_moments(together, TEXT).single


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
