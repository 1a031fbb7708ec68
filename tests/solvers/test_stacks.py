"""Factors of one rank for the matrices of all experts, against slow ways to the same numbers."""

import pytest
import torch

from makd.solvers import decompose_fisher, decompose_svd, decompose_two_sided, decompose_whitened
from makd.solvers.stacks import StackProblem, decompose_stack

EXPERTS, OUT, IN = 3, 7, 9
SIDES = ["", "reduce", "expand"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(size, seed):
    rows = random(4 * size, size, seed=seed)
    return rows.T @ rows / len(rows)


WEIGHTS = list(random(EXPERTS, OUT, IN).float())
GRAMS = [gram(IN, seed) for seed in (1, 2, 3)]
SHARES = torch.tensor([0.9, 0.6, 0.5], dtype=torch.float64)
LAYER = sum(share * one for share, one in zip(SHARES, GRAMS, strict=True)) / SHARES.sum()
GRADIENTS = gram(OUT, 4)


def problem(**changes):
    known = {"grams": GRAMS, "layer_gram": LAYER, "gradient_gram": GRADIENTS}
    return StackProblem(WEIGHTS, SHARES, **{**known, **changes})


def error(asked, factors):
    """The error by its definition, with the ridge that gradients' moments get."""
    out = torch.eye(OUT, dtype=torch.float64)
    if asked.gradient_gram is not None:
        out = asked.gradient_gram + 1e-2 * asked.gradient_gram.diagonal().mean() * out
    total = 0.0
    for index in range(EXPERTS):
        expand, reduce = (side[index if len(side) > 1 else 0].double() for side in (factors.expand, factors.reduce))
        rest = asked.weights[index].double() - expand @ reduce
        read = torch.eye(IN, dtype=torch.float64) if asked.grams is None else asked.grams[index]
        total += float(asked.shares[index]) * float((out @ rest @ read * rest).sum())
    return total


@pytest.mark.parametrize("side", SIDES)
class TestEverySide:
    @pytest.mark.parametrize("rank", [1, 3, 6])
    def test_the_error_that_is_told_is_that_of_the_factors(self, side, rank):
        for asked in (problem(), problem(gradient_gram=None), problem(grams=None, layer_gram=None)):
            found = decompose_stack(asked, side)
            assert found.spectrum.squared_error(rank) == pytest.approx(
                error(asked, found.factors(rank, torch.float64)), rel=1e-4
            )

    def test_all_terms_give_the_weights(self, side):
        asked = problem()
        found = decompose_stack(asked, side)
        terms = found.reduce.shape[1]
        rebuilt = found.factors(terms, torch.float64)
        product = rebuilt.expand @ rebuilt.reduce
        torch.testing.assert_close(product.float(), torch.stack(WEIGHTS), rtol=1e-4, atol=1e-4)

    def test_a_side_that_is_shared_stands_there_once(self, side):
        factors = decompose_stack(problem(), side).factors(2, torch.float32)
        assert factors.expand.shape == (1 if side == "expand" else EXPERTS, OUT, 2)
        assert factors.reduce.shape == (1 if side == "reduce" else EXPERTS, 2, IN)

    def test_fewer_terms_are_the_first_of_all(self, side):
        few, whole = decompose_stack(problem(), side, 3), decompose_stack(problem(), side)
        for rank in (0, 1, 2, 3):
            assert few.spectrum.squared_error(rank) == pytest.approx(whole.spectrum.squared_error(rank), rel=1e-6)

    def test_no_step_away_from_the_factors_is_better(self, side):
        """With one A the best is not known in closed form: its Bs are the best for it."""
        asked = problem()
        factors = decompose_stack(asked, side).factors(3, torch.float64)
        best = error(asked, factors)
        for seed in range(5):
            sides = ["expand"] if side == "reduce" else ["expand", "reduce"]
            for one in sides:
                moved = {"expand": factors.expand, "reduce": factors.reduce}
                moved[one] = moved[one] + 1e-3 * random(*moved[one].shape, seed=seed)
                assert error(asked, type(factors)(**moved)) > best

    def test_weights_that_are_the_same_are_no_worse_with_one_side_for_all(self, side):
        asked = StackProblem([WEIGHTS[0]] * EXPERTS, SHARES, [LAYER] * EXPERTS, LAYER, GRADIENTS)
        found, apart = decompose_stack(asked, side), decompose_stack(asked)
        for rank in (1, 3, 5):
            assert found.spectrum.squared_error(rank) == pytest.approx(apart.spectrum.squared_error(rank), rel=1e-6)


KIN = {
    "two_sided": ({}, lambda i: decompose_two_sided(WEIGHTS[i], GRAMS[i], GRADIENTS)),
    "whitened": ({"gradient_gram": None}, lambda i: decompose_whitened(WEIGHTS[i], GRAMS[i])),
    "fisher": ({"grams": None, "layer_gram": None, "by_rows": True}, lambda i: decompose_fisher(WEIGHTS[i], GRADIENTS)),
    "svd": ({"grams": None, "layer_gram": None, "gradient_gram": None}, lambda i: decompose_svd(WEIGHTS[i])),
}
"""Solver of linears -> what a stack's problem has with it, and what it makes of an expert."""


@pytest.mark.parametrize("solver", KIN)
def test_experts_apart_are_as_linears_one_by_one(solver):
    changes, decompose = KIN[solver]
    found = decompose_stack(problem(**changes))
    factors, lost = found.factors(3, torch.float32), 0.0
    for index in range(EXPERTS):
        own = decompose(index).factors(3)
        product = factors.expand[index] @ factors.reduce[index]
        torch.testing.assert_close(product, own.expand @ own.reduce, rtol=1e-4, atol=1e-5)
        lost += float(SHARES[index]) * own.squared_error
    assert found.spectrum.squared_error(3) == pytest.approx(lost, rel=1e-6)


@pytest.mark.parametrize("side", ["reduce", "expand"])
@pytest.mark.parametrize("rank", [1, 3])
def test_an_expert_that_gets_all_tokens_alone_decides_on_the_side_for_all(side, rank):
    shares = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    factors = decompose_stack(StackProblem(WEIGHTS, shares, GRAMS, GRAMS[0], GRADIENTS), side).factors(
        rank, torch.float64
    )
    own = decompose_two_sided(WEIGHTS[0], GRAMS[0], GRADIENTS).factors(rank)
    product = (factors.expand[0] @ factors.reduce[0]).float()
    torch.testing.assert_close(product, own.expand @ own.reduce, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_each_column_of_b_is_as_long_as_what_flows_into_it_is_large(side):
    """In each expert; with a side that is one for all, on average over them, by their tokens."""
    factors = decompose_stack(problem(), side).factors(3, torch.float64)
    lengths = factors.expand.square().sum(1)
    flowing = ((factors.reduce @ torch.stack(GRAMS)) * factors.reduce).sum(-1)
    if side:
        lengths, flowing = lengths.mean(0), SHARES @ flowing / SHARES.sum()
    torch.testing.assert_close(lengths, flowing, rtol=1e-4, atol=1e-6)


def test_what_is_common_to_what_experts_read_is_found_as_one_a():
    """Experts that look at the same three directions lose nothing with one A of rank three."""
    common = random(3, IN, seed=5)
    weights = [(random(OUT, 3, seed=seed) @ common).float() for seed in (6, 7, 8)]
    found = decompose_stack(StackProblem(weights, SHARES, GRAMS, LAYER, GRADIENTS), "reduce", 3)
    assert found.spectrum.relative_error(3) < 1e-8
    other = decompose_stack(StackProblem(weights, SHARES, GRAMS, LAYER, GRADIENTS), "expand", 3)
    assert other.spectrum.relative_error(3) > 1e-3


@pytest.mark.parametrize("side", SIDES)
def test_a_rank_that_there_are_no_terms_for_is_an_error(side):
    with pytest.raises(ValueError, match="rank is in"):
        decompose_stack(problem(), side).factors(99, torch.float32)
