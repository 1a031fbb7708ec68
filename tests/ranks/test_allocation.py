"""Budget -> the rank of every linear, exactly."""

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

import makd
from makd.errors import BudgetError, NumericsError
from makd.ranks.allocation import RANK_RULES, LinearSize, allocate, smallest_parameters

BERT = [
    LinearSize(f"{layer}.{name}", *shape, True)
    for layer in range(3)
    for name, shape in {"q": (96, 96), "k": (96, 96), "up": (384, 96), "down": (96, 384)}.items()
]


def spectra_of(sizes, seed=0):
    """Decaying, each at its own rate and scale."""
    generator = torch.Generator().manual_seed(seed)
    spectra = {}
    for size in sizes:
        rate, scale = torch.rand(2, generator=generator, dtype=torch.float64)
        terms = torch.arange(1, min(size.out_features, size.in_features) + 1, dtype=torch.float64)
        spectra[size.name] = (scale + 0.1) * terms.pow(-2 * rate)
    return spectra


LLAMA = [
    LinearSize(f"{layer}.{name}", *shape, False)
    for layer in range(4)
    for name, shape in {"q": (96, 96), "k": (32, 96), "o": (96, 96), "up": (256, 96), "down": (96, 256)}.items()
]


def best_energy(sizes, allowance, spectra, rank_multiple):
    """The most that any ranks keep which are multiples (or below the first), by a mixed-integer program."""
    values, weights, owners = [], [], []
    for owner, size in enumerate(sizes):
        energies = spectra[size.name].square().cumsum(0)
        small = range(1, min(rank_multiple, size.break_even + 1))
        for rank in [*small, *range(rank_multiple, size.break_even + 1, rank_multiple), None]:
            values.append(float(energies[-1 if rank is None else rank - 1]))
            weights.append(size.parameters(rank))
            owners.append(owner)
    one_each = (np.array(owners) == np.arange(len(sizes))[:, None]).astype(float)
    found = milp(
        -np.array(values),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(np.array(weights)[None], 0, allowance)],
        integrality=np.ones(len(values)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-7},
    )
    return -found.fun


def kept_energy(plan, spectra, sensitivities=None):
    """What the ranks keep of all squared singular values, from the definition."""
    return sum(
        (sensitivities or {}).get(name, 1.0) * float(spectra[name][: plan.ranks[name]].square().sum())
        for name in plan.ranks
    )


def total(sizes, plan):
    """Parameters, counted from the definition."""
    weights = 0
    for size in sizes:
        rank = plan.ranks[size.name]
        dense = size.out_features * size.in_features
        weights += dense if rank is None else rank * (size.out_features + size.in_features)
        weights += size.out_features if size.has_bias else 0
    return weights


def problems(largest=40, least=1):
    """What `solve` takes. Plain values: our functions' type checks draw random numbers, which hypothesis forbids."""
    side = st.integers(least, largest)
    return st.fixed_dictionaries(
        {
            "shapes": st.lists(st.tuples(side, side, st.booleans()), min_size=1, max_size=6),
            "share": st.floats(0, 1),
            "seed": st.integers(0, 5),
            "rule": st.sampled_from(sorted(RANK_RULES)),
            "rank_multiple": st.sampled_from([None, 1, 2, 8]),
        }
    )


def solve(problem, **changed):
    """(sizes, allowance, spectra, plan) for a share of what stands between the smallest student and all dense."""
    options = {**problem, **changed}
    sizes = [LinearSize(str(index), *shape) for index, shape in enumerate(options.pop("shapes"))]
    smallest = smallest_parameters(sizes, grain(problem))
    allowance = smallest + int(options.pop("share") * (sum(size.parameters(None) for size in sizes) - smallest))
    spectra = spectra_of(sizes, options.pop("seed"))
    return sizes, allowance, spectra, allocate(sizes, allowance, spectra=spectra, **options)


def grain(problem):
    """What every rank is a multiple of."""
    return problem["rank_multiple"] or 1


def check_ranks_are_allowed(sizes, plan, problem):
    for size in sizes:
        rank = plan.ranks[size.name]
        if rank is not None:
            assert rank >= 1
            assert rank % grain(problem) == 0
            assert rank * (size.out_features + size.in_features) < size.out_features * size.in_features


@given(problems())
@settings(max_examples=200)
def test_the_total_is_never_above_the_allowance_and_told_truly(problem):
    sizes, allowance, _, plan = solve(problem)
    assert list(plan.ranks) == [size.name for size in sizes]
    assert plan.parameters == total(sizes, plan) <= allowance
    check_ranks_are_allowed(sizes, plan, problem)


@given(problems())
@example(
    {"shapes": [(3, 5, False), (7, 18, False)], "share": 0.9375, "seed": 0, "rule": "energy", "rank_multiple": 1}
)  # fmt: skip
@settings(max_examples=200)
def test_no_linear_could_take_another_rank(problem):
    sizes, allowance, _, plan = solve(problem)
    left, more = allowance - plan.parameters, grain(problem)
    for size in sizes:
        rank = plan.ranks[size.name]
        if rank is not None:
            larger = rank + more if (rank + more) * size.step < size.dense else None
            assert size.parameters(larger) - size.parameters(rank) > left


@given(problems(largest=60, least=20))
@settings(max_examples=200)
def test_the_total_is_within_a_step_of_the_smallest_linear_below_the_allowance(problem):
    sizes, allowance, _, plan = solve(problem)
    more = grain(problem)
    factorable = [size for size in sizes if size.break_even >= more]
    step = min((size.step for size in factorable), default=0)
    dense = max((size.dense for size in factorable if size.step == step), default=0)
    largest = max((size.step for size in factorable), default=0)
    assume(dense >= more * largest + more * step)  # what the guarantee asks for
    assert all(rank is None for rank in plan.ranks.values()) or allowance - plan.parameters < more * step


def test_the_smallest_linear_makes_room_when_only_large_ones_can_grow():
    # small: 32 a rank, 256 dense; large: 120 a rank. Small dense and 5 ranks of large leave 100 of 956. A sixth rank
    # of large costs 20 more than that, and small goes down to 7 ranks, 224: 12 are left.
    sizes = [LinearSize("small", 16, 16, False), LinearSize("large", 60, 60, False)]
    spectra = {"small": torch.full((16,), 10.0), "large": torch.linspace(1, 0.1, 60)}
    assert allocate(sizes, 856, "global", spectra).ranks == {"small": None, "large": 5}
    plan = allocate(sizes, 956, "global", spectra)
    assert plan.ranks == {"small": 7, "large": 6}
    assert plan.parameters == 944


def test_any_real_models_shapes_meet_the_budget_within_a_step():
    shapes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "up": (1536, 576), "down": (576, 1536)}
    sizes = [
        LinearSize(f"{layer}.{name}", *shape, False) for layer in range(30) for name, shape in shapes.items()
    ]  # SmolLM2-135M
    dense = sum(size.parameters(None) for size in sizes)
    for keep in (0.05, 0.3, 0.501, 0.8, 0.97, 0.999):
        for rule in RANK_RULES:
            plan = allocate(sizes, int(keep * dense), rule, spectra_of(sizes))
            assert 0 <= int(keep * dense) - plan.parameters < 192 + 576


@given(problems(largest=60, least=20))
@settings(max_examples=150)
def test_by_default_at_most_three_ranks_above_the_first_multiple_are_off_it(problem):
    # one that takes up the rest; if that is large, and the smallest linears are dense, the two that trade besides
    *_, plan = solve({**problem, "rank_multiple": None})
    assert sum(rank is not None and rank > 8 and rank % 8 > 0 for rank in plan.ranks.values()) <= 3


@pytest.mark.parametrize("rule", sorted(RANK_RULES))
def test_by_default_at_most_one_rank_of_a_transformer_is_off_the_multiple(rule):
    dense = sum(size.parameters(None) for size in BERT)
    for percent in range(20, 90, 7):
        plan = allocate(BERT, dense * percent // 100, rule, spectra_of(BERT))
        assert sum(rank is not None and rank > 8 and rank % 8 > 0 for rank in plan.ranks.values()) <= 1


@pytest.mark.parametrize("rule", sorted(RANK_RULES))
def test_an_allowance_for_everything_leaves_everything_dense(rule):
    plan = allocate(BERT, sum(size.parameters(None) for size in BERT), rule, spectra_of(BERT))
    assert set(plan.ranks.values()) == {None}


@pytest.mark.parametrize("rule", sorted(RANK_RULES))
@pytest.mark.parametrize("multiple", [None, 5])
def test_the_smallest_student_is_possible_and_one_parameter_less_is_not(rule, multiple):
    lowest = multiple or 1
    smallest = 3 * (2 * (lowest * 192 + 96) + lowest * 480 * 2 + 384 + 96)
    assert smallest_parameters(BERT, lowest) == smallest
    plan = allocate(BERT, smallest, rule, spectra_of(BERT), multiple)
    assert set(plan.ranks.values()) == {lowest}
    with pytest.raises(BudgetError, match=f"{smallest:,}, the smallest possible student"):
        allocate(BERT, smallest - 1, rule, spectra_of(BERT), multiple)


@pytest.mark.parametrize("rule", sorted(RANK_RULES))
def test_a_rank_multiple_that_is_asked_for_holds_for_every_linear_and_the_rest_is_given_up(rule):
    dense = sum(size.parameters(None) for size in BERT)
    for percent in range(40, 100, 7):
        allowance = dense * percent // 100
        plan = allocate(BERT, allowance, rule, spectra_of(BERT), rank_multiple=16)
        ranks = [rank for rank in plan.ranks.values() if rank is not None]
        assert ranks
        assert all(rank % 16 == 0 for rank in ranks)
        assert 0 <= allowance - plan.parameters < 16 * 192


def test_a_linear_without_a_multiple_below_break_even_stays_dense():
    # 20 x 20: 9 ranks are less than the matrix; 60 x 60: 29
    sizes = [LinearSize("small", 20, 20, False), LinearSize("large", 60, 60, False)]
    assert smallest_parameters(sizes, 16) == 400 + 16 * 120
    assert allocate(sizes, 400 + 16 * 120, rank_multiple=16).ranks == {"small": None, "large": 16}
    with pytest.raises(BudgetError, match="with rank 16 everywhere they have 2,320"):
        allocate(sizes, 400 + 16 * 120 - 1, rank_multiple=16)


def test_a_matrix_that_no_rank_makes_smaller_stays_dense():
    sizes = [LinearSize("row", 1, 50, False), LinearSize("square", 20, 20, False)]
    assert allocate(sizes, 50 + 40).ranks == {"row": None, "square": 1}


def test_uniform_keeps_the_same_share_of_every_linear():
    dense = sum(size.parameters(None) for size in BERT)
    plan = allocate(BERT, dense // 2, "uniform", rank_multiple=1)
    shares = [size.weights(plan.ranks[size.name]) / size.dense for size in BERT]
    assert max(shares) - min(shares) <= max(2 * size.step / size.dense for size in BERT)


def test_energy_keeps_the_same_share_of_energy_in_every_linear():
    spectra = spectra_of(BERT)
    plan = allocate(BERT, sum(size.parameters(None) for size in BERT) // 2, "energy", spectra, rank_multiple=1)
    # the share stands between what each factored linear keeps and what it would keep with one rank less
    kept, before = [], []
    for size in BERT:
        energy, rank = spectra[size.name].square(), plan.ranks[size.name]
        if rank is not None and rank > 1:
            kept.append(float(energy[:rank].sum() / energy.sum()))
            before.append(float(energy[: rank - 1].sum() / energy.sum()))
    assert len(kept) > 3
    # the linear that takes up the rest may be a few ranks above
    assert sorted(before)[-2] <= min(kept)


def test_energy_does_not_look_at_scale():
    spectra = spectra_of(BERT)
    scaled = {name: spectrum * (index + 1) for index, (name, spectrum) in enumerate(spectra.items())}
    allowance = sum(size.parameters(None) for size in BERT) // 2
    assert allocate(BERT, allowance, "energy", spectra) == allocate(BERT, allowance, "energy", scaled)


def test_energy_gives_a_linear_without_any_no_more_than_it_must():
    sizes = [LinearSize("dead", 30, 30, False), LinearSize("alive", 30, 30, False)]
    spectra = {"dead": torch.zeros(30), "alive": torch.linspace(2, 1, 30)}
    assert allocate(sizes, 600, "energy", spectra, rank_multiple=1).ranks == {"dead": 1, "alive": 9}


def test_global_takes_the_largest_terms_of_all_linears():
    sizes = [LinearSize("one", 30, 30, False), LinearSize("two", 30, 30, False)]
    one, two = torch.zeros(30), torch.zeros(30)
    one[:6] = torch.tensor([9.0, 8, 7, 6, 5, 4])
    two[:3] = torch.tensor([6.5, 3, 2])
    plan = allocate(sizes, 7 * 60, "global", {"one": one, "two": two}, rank_multiple=1)
    assert plan.ranks == {"one": 6, "two": 1}
    plan = allocate(sizes, 7 * 60, "global", {"one": one, "two": two}, rank_multiple=1, sensitivities={"two": 4.0})
    assert plan.ranks == {"one": 5, "two": 2}  # 2's gains, 169 and 36, against 1's: 81, 64, 49, 36, 25, 16


def test_global_weighs_a_gain_by_what_it_costs():
    sizes = [LinearSize("small", 30, 30, False), LinearSize("large", 300, 30, False)]
    spectra = {"small": torch.full((30,), 1.0), "large": torch.full((30,), 1.5)}
    plan = allocate(sizes, 330 * 2 + 60 * 8, "global", spectra, rank_multiple=1)
    assert plan.ranks["large"] == 1  # 2.25 / 330 is less than 1 / 60


def test_global_goes_from_low_ranks_to_dense_at_once_where_that_is_the_better_bargain():
    # a rank of `flat` keeps 1 for 60 weights, and one of `steep` 1.3; but flat's last 29 terms come for 840 when dense
    sizes = [LinearSize(name, 30, 30, False) for name in ("flat", "steep")]
    spectra = {"flat": torch.ones(30), "steep": torch.tensor([1.3] * 8 + [0.0] * 22).sqrt()}
    plan = allocate(sizes, 900 + 60, "global", spectra, rank_multiple=1)
    assert plan.ranks == {"flat": None, "steep": 1}


@given(problems(), st.lists(st.floats(0.01, 100), min_size=6, max_size=6))
@settings(max_examples=200)
def test_global_keeps_no_less_weighted_energy_than_uniform(problem, weights):
    sensitivities = {str(index): weight for index, weight in enumerate(weights)}
    kept = {}
    for rule in ("global", "uniform"):
        _, _, spectra, plan = solve(problem, rule=rule, sensitivities=sensitivities)
        kept[rule] = kept_energy(plan, spectra, sensitivities)
    assert kept["global"] >= kept["uniform"] * (1 - 1e-12)


def test_global_keeps_much_more_than_uniform_where_linears_differ():
    spectra = spectra_of(BERT)
    allowance = sum(size.parameters(None) for size in BERT) // 4
    lost = {
        rule: kept_energy(allocate(BERT, 10**9, rule, spectra), spectra)
        - kept_energy(allocate(BERT, allowance, rule, spectra), spectra)
        for rule in ("global", "uniform")
    }
    assert lost["global"] < 0.8 * lost["uniform"]


def test_an_unknown_rule_offers_the_nearest():
    with pytest.raises(makd.MakdError, match="'uniform'"):
        allocate(BERT, 10**6, "unifrom")


@pytest.mark.parametrize("rule", ["energy", "global"])
def test_missing_spectra_are_named(rule):
    with pytest.raises(ValueError, match=r"0\.q has none"):
        allocate(BERT, 10**6, rule, {})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_spectrum_that_is_not_finite_is_refused_by_name(value):
    spectra = spectra_of(BERT)
    spectra["1.up"][3] = value
    with pytest.raises(NumericsError, match=r"1\.up"):
        allocate(BERT, 10**6, "global", spectra)


def test_a_negative_sensitivity_is_refused_by_name():
    with pytest.raises(NumericsError, match=r"1\.up"):
        allocate(BERT, 10**6, "global", spectra_of(BERT), sensitivities={"1.up": -1.0})


def test_two_linears_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        allocate([BERT[0], BERT[0]], 10**6)


@pytest.mark.parametrize("sizes", [BERT, LLAMA], ids=["bert", "llama"])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.6, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_global_is_within_a_thousandth_of_the_integer_optimum(sizes, share, seed):
    spectra = spectra_of(sizes, seed)
    allowance = int(share * sum(size.parameters(None) for size in sizes))
    plan = allocate(sizes, allowance, "global", spectra=spectra)
    assert kept_energy(plan, spectra) >= 0.999 * best_energy(sizes, allowance, spectra, rank_multiple=8)


def test_no_clock_has_a_say_in_the_ranks(monkeypatch):
    """Where the search for the optimum gives up after seconds, a busier machine makes another student."""
    asked = []

    def noting(*args, **kwargs):
        asked.append(set(kwargs["options"]))  # scipy takes out what it has read
        return milp(*args, **kwargs)

    monkeypatch.setattr("makd.ranks.allocation.milp", noting)
    few = BERT[:6]
    allocate(few, sum(size.parameters(None) for size in few) // 2, "global", spectra=spectra_of(few))
    assert asked == [{"mip_rel_gap", "node_limit"}]
