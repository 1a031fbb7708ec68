"""A bound on a student's parameters -> what the linears may have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import makd
from makd import Budget


def allowance(budget, total, linears, smallest_linears=1):
    """What linears may have of a teacher of `total` parameters, as a student is planned: the limit, less the rest."""
    limit, rest = budget.limit(total, linears), total - linears
    Budget.check(limit, total, rest, rest + smallest_linears)
    return limit - rest


@pytest.mark.parametrize("given_values", [{}, {"keep": 0.5, "params": 10}, {"keep": 0.5, "keep_linears": 0.5}])
def test_exactly_one_bound_is_given(given_values):
    with pytest.raises(makd.MakdError, match="exactly one of params, keep and keep_linears"):
        Budget(**given_values)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in ("keep", "keep_linears") for value in (0.0, -0.1, 1.01)]
)
def test_a_share_outside_its_range_is_refused_with_the_value_and_the_range(name, value):
    with pytest.raises(makd.MakdError, match=rf"{name} .* \(0, 1\]; got {value}"):
        Budget(**{name: value})


@pytest.mark.parametrize("params", [0, -5])
def test_a_number_of_parameters_below_one_is_refused(params):
    with pytest.raises(makd.MakdError, match=f"above 0; got {params}"):
        Budget(params=params)


def test_each_kind_of_budget_leaves_the_linears_what_the_rest_does_not_need():
    assert allowance(Budget(params=700), 1000, 600) == 300
    assert allowance(Budget(keep=0.7), 1000, 600) == 300
    assert allowance(Budget(keep_linears=0.5), 1000, 600) == 300


@pytest.mark.parametrize("kind", ["keep", "keep_linears"])
@given(percent=st.integers(1, 100), linears=st.integers(100, 10**12))
def test_a_share_is_taken_as_written_and_rounded_down(kind, percent, linears):
    found = allowance(Budget(**{kind: percent / 100}), linears, linears)
    assert found == percent * linears // 100


def test_all_is_allowed():
    assert allowance(Budget(keep=1.0), 1000, 600) == 600
    assert allowance(Budget(params=1000), 1000, 600) == 600


def test_a_budget_above_the_teacher_is_refused_with_what_it_has():
    with pytest.raises(makd.MakdError, match="1,001 parameters is above the teacher, which has 1,000"):
        allowance(Budget(params=1001), 1000, 600)


def test_a_budget_below_the_smallest_student_is_refused_with_its_size():
    assert allowance(Budget(params=450), 1000, 600, smallest_linears=50) == 50
    for budget in (Budget(params=449), Budget(keep=0.3), Budget(keep_linears=0.08)):
        with pytest.raises(makd.MakdError, match=r"smallest possible student, rank 1 .* have 400.* from 450 to 1,000"):
            allowance(budget, 1000, 600, smallest_linears=50)


def test_linears_that_are_not_part_of_the_model_are_a_bug_of_the_caller():
    with pytest.raises(ValueError, match="1,001 parameters of linears are not part of 1,000"):
        allowance(Budget(keep=0.5), 1000, 1001)
