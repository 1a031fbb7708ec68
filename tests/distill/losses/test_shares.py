"""A step's loss is a mean over its tokens: the weights of batches, and what is logged."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import makd
from makd.anatomy import resolve
from makd.aspects import Term, activate
from makd.distill.losses.counted import count
from makd.distill.losses.shares import WHOLE, RunningMeans, step_shares, terms_of
from makd.tasks.features import NOWHERE
from tests.models import tiny


def plan(*terms, name="bert", head="base"):
    return activate(makd.Plan(terms=terms), resolve(tiny(name, head=head))), resolve(tiny(name, head=head))


def rows(*lengths, labels=None):
    mask = torch.tensor([[place < length for place in range(max(lengths))] for length in lengths]).long()
    found = {"input_ids": mask * 7, "attention_mask": mask}
    return found if labels is None else {**found, "labels": labels}


@given(st.lists(st.lists(st.integers(0, 1000), min_size=2, max_size=2), min_size=1, max_size=6))
def test_shares_add_up_to_one_and_go_by_what_is_counted(counts):
    table = torch.tensor(counts, dtype=torch.float64)
    shares = torch.tensor(step_shares(table), dtype=torch.float64)
    whole = table.sum(0)
    assert torch.allclose(shares.sum(0), (whole > 0).double())
    assert torch.allclose(shares * whole, table)


def test_tokens_inside_layers_are_the_real_ones():
    active, anatomy = plan(Term(aspect="hidden", layers="last"), Term(aspect="hidden", layers="last", tokens="first"))
    assert [int(n) for n in count(active, anatomy, rows(3, 5)).values()] == [8, 2]


def test_texts_and_pairs_of_texts_are_counted():
    active, anatomy = plan(Term(aspect="embedding"), Term(aspect="similarity"))
    assert count(active, anatomy, rows(3, 5, 2)) == {"embedding": 3, "similarity": 6}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[1, 2, 3, -100], [-100, -100, 4, 5]], 4),  # a causal model predicts no first token
        ([[1, -100, -100, -100], [-100, -100, -100, -100]], 0),
        (None, 0),
    ],
)
def test_labels_of_a_causal_model_are_those_that_something_predicts(labels, expected):
    active, anatomy = plan(Term(aspect="task"), name="llama", head="causal_lm")
    found = count(active, anatomy, rows(4, 4, labels=None if labels is None else torch.tensor(labels)))
    assert int(found["task"]) == expected


def test_labels_of_rows_are_those_that_are_there():
    active, anatomy = plan(Term(aspect="task"), head="sequence_classification")
    assert int(count(active, anatomy, rows(4, 4, 4, labels=torch.tensor([1, -100, 0])))["task"]) == 2
    assert int(count(active, anatomy, rows(4, 4, labels=torch.tensor([0.5, torch.nan])))["task"]) == 1


def test_labels_of_answers_are_those_whose_place_is_in_the_row():
    active, anatomy = plan(Term(aspect="task"), head="question_answering")
    places = torch.tensor([2, NOWHERE, 3, 4])  # the last one's begins where the row has ended
    inputs = {**rows(4, 4, 4, 4), "start_positions": places, "end_positions": places}
    assert int(count(active, anatomy, inputs)["task"]) == 2


def test_what_is_logged_is_weighed_and_leaves_out_what_counts_nothing():
    active, _ = plan(Term(aspect="embedding"), Term(aspect="similarity"))
    means = RunningMeans(terms_of(active))
    means.add({"embedding": torch.tensor(1.0), "similarity": torch.tensor(5.0)}, {"embedding": 0.25, "similarity": 0.0})
    means.add({"embedding": torch.tensor(3.0)}, {"embedding": 0.75})
    assert means.take(torch.device("cpu")) == {"embedding": 2.5}
    assert means.take(torch.device("cpu")) == {}


def test_a_batch_that_is_all_there_is_counts_whole():
    assert WHOLE["anything"] == 1.0
