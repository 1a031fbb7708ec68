"""Ranks under a budget: what is known before anything is decomposed, what sharing and each layer's worth make of it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from makd.ranks.allocation import LinearSize, smallest_parameters
from makd.ranks.planning import RankProblem, find_max_ranks, plan_ranks
from makd.ranks.sharing import InputGroup, with_groups
from makd.solvers.factors import Spectrum

GROUPS = (InputGroup(("q", "k", "v")), InputGroup(("gate", "up")))
SHAPES = {"q": (24, 24), "k": (8, 24), "v": (8, 24), "o": (24, 24), "gate": (40, 24), "up": (40, 24), "down": (24, 40)}


def problem(keep, multiple, share_input, has_bias, rule="uniform", max_ranks=None):
    sizes = [LinearSize(name, *shape, has_bias) for name, shape in SHAPES.items()]
    lowest = multiple or 1
    smallest = max(smallest_parameters(sizes, lowest), smallest_parameters(with_groups(sizes, GROUPS), lowest))
    allowance = max(int(keep * sum(size.parameters(None) for size in sizes)), smallest)
    return RankProblem(sizes, allowance, rule, multiple, {}, share_input, {}, max_ranks)


def kept(seed, fall=1.0, doubled=""):
    """Spectra of anything that is asked for; of some, and of their group, twice as large."""

    def spectra(names):
        found = {}
        for name in names:
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            values = torch.rand(24, generator=generator, dtype=torch.float64).sort(descending=True).values
            size = (2 if "+" in name else 1) * (2 if name[0] in doubled else 1)
            found[name] = Spectrum(values * fall ** torch.arange(24) * size)
        return found

    return spectra


@settings(max_examples=60)
@given(
    keep=st.floats(0.1, 0.8),
    multiple=st.sampled_from([None, 1, 2, 8]),
    share_input=st.sampled_from(["auto", "always"]),
    has_bias=st.booleans(),
    seed=st.integers(0, 20),
)
def test_no_rank_is_above_what_was_known_and_the_plan_is_the_same(keep, multiple, share_input, has_bias, seed):
    max_ranks = find_max_ranks(problem(keep, multiple, share_input, has_bias), GROUPS)
    assert max_ranks is not None
    free = plan_ranks(problem(keep, multiple, share_input, has_bias), GROUPS, kept(seed))
    bound = problem(keep, multiple, share_input, has_bias, max_ranks=max_ranks)
    found = plan_ranks(bound, GROUPS, kept(seed))
    for name, rank in found.items.ranks.items():
        assert rank is None or (rank <= max_ranks[name] and rank % (multiple or 1) == 0)
    assert found.items.parameters <= bound.allowance
    if 0 not in max_ranks.values():  # what stays dense whatever shares is settled: another may be dense without that
        assert found.items.parameters == free.items.parameters
        assert found.plan.ranks == free.plan.ranks


@settings(max_examples=60)
@given(keep=st.floats(0.8, 1.0), multiple=st.sampled_from([None, 1, 2, 8]), seed=st.integers(0, 20))
def test_where_some_stay_dense_the_budget_is_kept_and_no_rank_is_above_what_was_known(keep, multiple, seed):
    max_ranks = find_max_ranks(problem(keep, multiple, "auto", False), GROUPS)
    bound = problem(keep, multiple, "auto", False, max_ranks=max_ranks)
    found = plan_ranks(bound, GROUPS, kept(seed))
    for name, rank in found.items.ranks.items():
        assert rank is None or (rank <= max_ranks[name] and rank % (multiple or 1) == 0)
    assert found.items.parameters <= bound.allowance


def test_rules_that_go_by_spectra_know_nothing_before():
    for rule in ("energy", "global"):
        assert find_max_ranks(problem(0.5, 1, "auto", False, rule), GROUPS) is None


def test_a_budget_of_everything_leaves_all_dense():
    max_ranks = find_max_ranks(problem(1.0, 1, "never", False), ())
    assert set(max_ranks.values()) == {0}
    planned = plan_ranks(problem(1.0, 1, "never", False, max_ranks=max_ranks), (), kept(0))
    assert set(planned.items.ranks.values()) == {None}
    assert planned.items.parameters == sum(out * inp for out, inp in SHAPES.values())


@pytest.mark.parametrize("share_input", ["never", "auto", "always"])
def test_what_a_layer_is_worth_counts_for_its_linears_and_for_their_group(share_input):
    """A sensitivity of 4 is what singular values twice as large are."""
    asked = problem(0.4, 1, share_input, False, "global")
    groups = () if share_input == "never" else GROUPS
    weighed = plan_ranks(replace(asked, sensitivities=dict.fromkeys("qkv", 4.0)), groups, kept(0, 0.8))
    assert weighed == plan_ranks(asked, groups, kept(0, 0.8, doubled="qkv"))
    assert weighed.plan.ranks["q"] > plan_ranks(asked, groups, kept(0, 0.8)).plan.ranks["q"]


def test_biases_take_nothing_from_what_a_weight_is_worth():
    """They are there with any rank: what is compared is what the weights cost, with what the biases leave."""
    bare, biased = (problem(0.4, 1, "auto", has_bias, "global") for has_bias in (False, True))
    biases = sum(out for out, _ in SHAPES.values())
    found = plan_ranks(replace(biased, allowance=bare.allowance + biases), GROUPS, kept(0, 0.8)).found
    assert found == plan_ranks(bare, GROUPS, kept(0, 0.8)).found
    assert all(one.separate is not None for one in found)
