"""One A for linears that read the same input: when it is taken, what it gives, and that budgets stay exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import makd
from makd.anatomy import resolve
from makd.ranks.allocation import LinearSize, RankPlan, allocate, smallest_parameters
from makd.ranks.sharing import (
    InputGroup,
    SharedInput,
    best_of_each,
    by_linear,
    compare_at_equal_weights,
    compare_at_one_price,
    plan_error,
    units_of,
    with_groups,
)
from makd.solvers import decompose_fisher, decompose_two_sided, decompose_whitened
from makd.solvers.factors import Spectrum
from makd.solvers.fisher import FLOOR
from makd.student.linear import dense_weight
from makd.student.shared_linear import FollowingLinear, stacked_linear
from tests.models import batch, tiny

GROUP = InputGroup(("q", "k", "v"))


def weights_and_moments(seed=0):
    """Q, K and V of different widths, moments of their input, and of the gradients at their outputs."""
    generator = torch.Generator().manual_seed(seed)

    def gram(size):
        rows = torch.randn(60, size, generator=generator, dtype=torch.float64)
        mixed = rows @ torch.randn(size, size, generator=generator, dtype=torch.float64)
        return mixed.T @ mixed / 60

    sizes = (9, 4, 4)
    weights = [torch.randn(size, 8, generator=generator, dtype=torch.float64) for size in sizes]
    return weights, gram(8), [gram(size) * 10.0**power for power, size in enumerate(sizes)]


def best_shared(weights, inputs, outputs, rank):
    """The best stacked product of this rank, slowly: whole weighting matrix, numpy's SVD, pseudo-inverses."""
    lower = torch.linalg.cholesky(torch.block_diag(*outputs))
    right = torch.linalg.cholesky(inputs)
    left, values, vectors = torch.linalg.svd(lower.T @ torch.cat(weights) @ right, full_matrices=False)
    cut = left[:, :rank] * values[:rank] @ vectors[:rank]
    return torch.linalg.inv(lower.T) @ cut @ torch.linalg.inv(right), float(values[rank:].square().sum())


def test_a_shared_a_is_the_best_of_its_rank_in_the_sum_of_the_linears_errors():
    weights, inputs, outputs = weights_and_moments()
    decomposition = decompose_two_sided(torch.cat(weights), inputs, outputs, ridge=0.0)
    for rank in (1, 3, 6):
        expected, error = best_shared(weights, inputs, outputs, rank)
        factors = decomposition.factors(rank)
        torch.testing.assert_close(factors.expand @ factors.reduce, expected)
        change = torch.cat(weights) - factors.expand @ factors.reduce
        parts = change.split([len(weight) for weight in weights])
        measured = sum(
            float(torch.trace(gram @ part @ inputs @ part.T)) for gram, part in zip(outputs, parts, strict=True)
        )
        assert measured == pytest.approx(error)
        assert decomposition.squared_error(rank) == pytest.approx(error)


def test_the_ridge_of_each_linears_gradients_is_its_own():
    weights, inputs, outputs = weights_and_moments()
    ridged = [gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram)).double() for gram in outputs]
    one = decompose_two_sided(torch.cat(weights), inputs, outputs, ridge=0.01)
    two = decompose_two_sided(torch.cat(weights), inputs, ridged, ridge=0.0)
    torch.testing.assert_close(one.singular_values, two.singular_values)


def test_fisher_weighs_the_rows_of_each_linear_by_its_own_gradients():
    weights, _, outputs = weights_and_moments()
    scales = [gram.diagonal() + FLOOR * gram.diagonal().mean() for gram in outputs]
    expected = torch.linalg.svdvals(torch.cat(scales).sqrt()[:, None] * torch.cat(weights))
    torch.testing.assert_close(decompose_fisher(torch.cat(weights), outputs).singular_values, expected)


def test_one_matrix_and_a_list_of_one_are_the_same_bit_for_bit():
    (weight, *_), inputs, (outputs, *_) = weights_and_moments()
    one, two = (decompose_two_sided(weight, inputs, grams) for grams in (outputs, [outputs]))
    assert torch.equal(one.left, two.left)
    assert torch.equal(one.right, two.right)


@settings(max_examples=40)
@given(
    keep=st.floats(0.25, 1.0),
    multiple=st.sampled_from([None, 1, 2, 8]),
    rule=st.sampled_from(["uniform", "energy", "global"]),
    has_bias=st.booleans(),
    seed=st.integers(0, 5),
)
def test_budgets_with_groups_are_exact(keep, multiple, rule, has_bias, seed):
    sizes = [LinearSize(name, out, 24, has_bias) for name, out in (("q", 24), ("k", 8), ("v", 8), ("o", 24))]
    items = with_groups(sizes, [GROUP])
    assert [(item.name, item.out_features) for item in items] == [("q + k + v", 40), ("o", 24)]
    generator = torch.Generator().manual_seed(seed)
    spectra = {item.name: torch.rand(24, generator=generator).sort(descending=True).values for item in items}
    smallest = smallest_parameters(items, multiple or 1)
    allowance = max(int(keep * sum(size.parameters(None) for size in sizes)), smallest)
    plan = by_linear(allocate(items, allowance, rule, spectra, multiple), [GROUP])
    assert plan.ranks.keys() == {"q", "k", "v", "o"}
    assert len({plan.ranks[name] for name in GROUP.linears}) == 1
    assert all(rank is None or rank % (multiple or 1) == 0 for rank in plan.ranks.values())
    rank = plan.ranks["q"]
    spent = sum(size.parameters(None) for size in sizes[:3]) if rank is None else 0
    if rank is not None:  # A once, a B for each
        spent = rank * 24 + sum(rank * size.out_features + has_bias * size.out_features for size in sizes[:3])
    spent += sizes[3].parameters(plan.ranks["o"])
    assert spent == plan.parameters <= allowance
    everything = sum(size.parameters(None) for size in sizes)
    assert plan.parameters == everything or allowance - plan.parameters < 48 * (multiple or 1)  # a step of o


def spectra_of(weights):
    sizes = [LinearSize(name, *weight.shape, False) for name, weight in zip(GROUP.linears, weights, strict=True)]
    spectra = {name: torch.linalg.svdvals(weight) for name, weight in zip(GROUP.linears, weights, strict=True)}
    return sizes, spectra | {GROUP.name: torch.linalg.svdvals(torch.cat(weights))}


@pytest.mark.parametrize("shared", [True, False])
def test_linears_share_where_their_inputs_matter_in_the_same_directions(shared):
    torch.manual_seed(0)
    common = torch.randn(6, 32)
    weights = [
        torch.randn(32, 6) @ (common if shared else torch.randn(6, 32)) + 0.1 * torch.randn(32, 32) for _ in range(3)
    ]
    sizes, spectra = spectra_of(weights)
    (found,) = compare_at_one_price(sizes, [GROUP], 3 * 6 * 64, spectra, {}, 1)
    assert found.shared == shared
    assert (found.together < found.separate) == shared


@pytest.mark.parametrize(("together", "shared"), [(0.99, True), (0.999, False), (1.0, False)])
def test_what_is_better_by_less_than_predictions_are_worth_is_not_shared(together, shared):
    def lost(error):
        return Spectrum(torch.tensor([2.0, error**0.5], dtype=torch.float64))

    spectra = {"q": lost(0.5), "k": lost(0.25), "v": lost(0.25), GROUP.name: lost(together)}
    (found,) = compare_at_equal_weights([GROUP], dict.fromkeys(spectra, 1), spectra)
    assert (found.separate, found.together) == (pytest.approx(1.0), pytest.approx(together))
    assert found.shared == shared


def test_the_better_way_at_one_price_has_the_smaller_error_at_one_budget():
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(20, 20, generator=generator) * torch.logspace(0, -1.5, 20)
        weights = [torch.randn(20, 20, generator=generator) @ base for _ in range(3)]
        sizes, spectra = spectra_of(weights)
        (found,) = compare_at_one_price(sizes, [GROUP], 600, spectra, {}, 1)
        apart = plan_error(allocate(sizes, 600, "global", spectra, 1), spectra, {})
        together = plan_error(allocate(with_groups(sizes, [GROUP]), 600, "global", spectra, 1), spectra, {})
        if abs(apart - together) > 0.1 * apart:  # closer than a rank, steps decide
            assert found.shared == (together < apart)


def test_what_a_layer_is_worth_weighs_its_group_as_it_weighs_its_linears():
    """A sensitivity of 4 is what singular values twice as large are."""
    torch.manual_seed(0)
    weights = [torch.randn(20, 6) @ torch.randn(6, 20) + 0.3 * torch.randn(20, 20) for _ in range(3)]
    sizes, spectra = spectra_of(weights)
    sizes, spectra = [*sizes, LinearSize("o", 20, 20, False)], spectra | {"o": torch.linalg.svdvals(weights[0].T)}
    doubled = {name: values * (1 if name == "o" else 2) for name, values in spectra.items()}
    weighed = compare_at_one_price(sizes, [GROUP], 800, spectra, dict.fromkeys(GROUP.linears, 4.0), 1)
    (expected,) = compare_at_one_price(sizes, [GROUP], 800, doubled, {}, 1)
    assert weighed == [expected]
    assert expected != compare_at_one_price(sizes, [GROUP], 800, spectra, {}, 1)[0]


def test_the_error_of_a_plan_counts_what_is_cut_of_each_linear_and_group_by_what_its_layer_is_worth():
    spectra = {GROUP.name: torch.tensor([5.0, 2.0, 1.0]), "o": torch.tensor([3.0, 3.0]), "up": torch.tensor([9.0])}
    plan = RankPlan({GROUP.name: 1, "o": 1, "up": None}, 0)
    assert plan_error(plan, spectra, dict.fromkeys(GROUP.linears, 4.0)) == 4 * (2**2 + 1**2) + 3**2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_of_the_ways_to_share_in_one_stack_the_one_that_loses_least_is_taken(order):
    ways = [
        SharedInput(("experts",), True, 1.0, 0.5, "reduce"),
        SharedInput(("experts",), True, 1.0, 0.4, "expand"),
        SharedInput(("others",), True, 1.0, 0.9, "reduce"),
    ]
    found = best_of_each([ways[place] for place in order])
    assert [(one.linears[0], one.side) for one in found] == [
        (ways[place].linears[0], ways[place].side) for place in order
    ]
    assert {(one.linears[0], one.side) for one in found if one.shared} == {("experts", "expand"), ("others", "reduce")}


def make(name, share_input, solver="svd", keep=0.5, **settings):
    teacher = tiny(name)
    batches = [batch(teacher, seed=seed) for seed in range(4)]
    return makd.factorize(
        teacher, makd.Budget(keep_linears=keep), solver=solver, calibration=batches, share_input=share_input, **settings
    )


@pytest.mark.parametrize("solver", ["svd", "fisher", "whitened", "two_sided", "regression", "two_sided_regression"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_every_solver_can_share_at_the_exact_budget(name, solver):
    student, teacher = make(name, "always", solver), tiny(name)
    linears = resolve(teacher).linears
    dense = sum(p.numel() for linear in linears for p in teacher.get_submodule(linear).parameters())
    kept = sum(p.numel() for linear in linears for p in student.get_submodule(linear).parameters())
    assert 0.5 * dense - 64 < kept <= 0.5 * dense
    groups = student.factorization.shared_inputs
    assert [group.linears for group in groups] == list(resolve(teacher).input_groups)
    for group in groups:
        first, *others = (student.get_submodule(linear) for linear in group.linears)
        if group.linears[0] in student.factorization.ranks:
            assert all(isinstance(other, FollowingLinear) and other.leader is first for other in others)


def test_never_has_no_group_and_auto_is_the_same_where_linears_apart_win():
    never, auto = (make("bert", share_input, "two_sided", keep=0.3) for share_input in ("never", "auto"))
    assert never.factorization.shared_inputs == ()
    if not any(group.shared for group in auto.factorization.shared_inputs):
        assert makd.fingerprint(never) == makd.fingerprint(auto)
    assert all(group.separate is not None for group in auto.factorization.shared_inputs)


@pytest.mark.parametrize("solver", ["svd", "whitened"])
def test_auto_shares_a_group_whose_linears_read_the_same_directions(solver):
    teacher = tiny("bert")
    common = torch.randn(6, 32)
    attention = teacher.encoder.layer[0].attention.self
    for linear in (attention.query, attention.key, attention.value):
        linear.weight.data = 0.3 * torch.randn(32, 6) @ common / 6**0.5
    batches = [batch(teacher, seed=seed) for seed in range(4)]
    never, auto = (
        makd.factorize(teacher, makd.Budget(keep_linears=0.3), solver=solver, rank_multiple=1, calibration=batches,
                       share_input=share_input)
        for share_input in ("never", "auto")
    )  # fmt: skip
    assert auto.factorization.shared_inputs[0].shared
    assert makd.fingerprint(never) != makd.fingerprint(auto)
    name = "encoder.layer.0.attention.self.query"
    assert auto.factorization.ranks[name] >= never.factorization.ranks[name]


def test_fused_linears_and_mixed_biases_make_no_group():
    assert resolve(tiny("gpt2")).input_groups == ()
    assert make("gpt2", "always").factorization.shared_inputs == ()
    teacher = tiny("bert")
    teacher.encoder.layer[0].attention.self.key = torch.nn.Linear(32, 32, bias=False)
    student = makd.factorize(teacher, makd.Budget(keep_linears=0.5), solver="svd", share_input="always")
    assert [group.linears[0] for group in student.factorization.shared_inputs] == [
        "encoder.layer.1.attention.self.query"
    ]


def test_groups_are_those_of_self_attention_cross_attention_and_gated_feed_forward():
    groups = resolve(tiny("t5_gated")).input_groups
    ends = [tuple(name.rpartition(".")[2] for name in group) for group in groups]
    assert ends == 2 * [("q", "k", "v"), ("wi_0", "wi_1")] + 2 * [("q", "k", "v"), ("k", "v"), ("wi_0", "wi_1")]


def test_whitened_linears_as_one_are_the_stacked_matrix():
    student, teacher = make("llama", "always", "whitened"), tiny("llama")
    names = resolve(teacher).input_groups[0]
    weight = torch.cat([dense_weight(teacher.get_submodule(name)) for name in names])
    assert torch.equal(stacked_linear([teacher.get_submodule(name) for name in names]).weight, weight)
    product = torch.cat([student.get_submodule(name).dense_weight() for name in names]).detach()
    rank = student.factorization.ranks[names[0]]
    assert torch.linalg.matrix_rank(product) == rank
    gram = torch.eye(32).double()
    error = decompose_whitened(weight, gram).squared_error(rank)
    assert float((product - weight).square().sum()) >= error * (1 - 1e-6)


def test_an_unknown_choice_is_refused():
    with pytest.raises(makd.MakdError, match="auto, never or always"):
        makd.FactorizeConfig(share_input="sometimes")


def test_linears_that_share_one_factor_are_one_unit_and_the_others_are_units_of_their_own():
    assert units_of(["q", "k", "v"], [("q", "v"), ("gate", "up")]) == [("q", "v"), ("k",)]
    assert units_of(["q"], [("q", "v")]) == [("q",)]
