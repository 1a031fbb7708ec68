"""The rows of linears that share one A."""

import pytest
import torch

import makd
from makd.run_folder.linears import linear_rows
from tests.models import tiny


@pytest.fixture(scope="module")
def student():
    text = [{"input_ids": torch.arange(20).reshape(2, 10)}]
    budget = makd.Budget(keep_linears=0.6)
    return makd.factorize(tiny("bert"), budget, calibration=text, solver="svd", ranks="uniform", share_input="always")


@pytest.fixture(scope="module")
def rows(student):
    return linear_rows(student, makd.resolve(student), None, {})


def test_say_who_has_the_same_a_whether_this_run_made_it_or_not(rows):
    by_leaf = {row["name"].rsplit(".", 1)[-1]: row for row in rows if row["layer"] == 0}
    assert [name.rsplit(".", 1)[-1] for name in by_leaf["key"]["shares_input_with"]] == ["query", "value"]


def test_have_as_many_weights_as_the_student(student, rows):
    weights = {
        id(weight): weight.numel()
        for row in rows
        for module in [student.get_submodule(row["name"])]
        for weight in ((module.reduce.weight, module.expand.weight) if row["rank"] else (module.weight,))
    }
    assert sum(row["weights"] for row in rows) == sum(weights.values())


def test_break_even_where_the_group_does(rows):
    query = next(row for row in rows if row["name"].endswith("query"))
    assert query["break_even"] == (3 * 32 * 32 - 1) // (32 + 3 * 32)
    assert query["rank"] <= query["break_even"]
