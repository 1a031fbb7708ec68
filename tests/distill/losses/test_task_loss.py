"""The task's loss where some rows have no label."""

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from makd.distill.losses.objective import task_loss
from tests.models import batch, tiny

NAN, BEYOND = float("nan"), 1_000_000


def loss_of(head, **targets):
    settings = {"num_labels": 1} if targets.get("labels", torch.zeros(1, dtype=int)).is_floating_point() else {}
    model = tiny("bert", head, **settings)
    inputs = {**batch(model), **targets}
    output = model(**inputs)
    return task_loss(inputs, output), output


@pytest.mark.parametrize(
    ("head", "targets"),
    [
        ("sequence_classification", {"labels": torch.full((4,), -100)}),
        ("sequence_classification", {"labels": torch.full((4,), NAN)}),
        ("token_classification", {"labels": torch.full((4, 12), -100)}),
        ("question_answering", dict.fromkeys(("start_positions", "end_positions"), torch.full((4,), BEYOND))),
    ],
)
def test_it_is_zero_where_no_row_has_a_label(head, targets):
    loss, _ = loss_of(head, **targets)
    assert float(loss.detach()) == 0
    loss.backward()


def test_classes_without_a_label_are_left_out():
    labels = torch.tensor([1, -100, 0, -100])
    loss, output = loss_of("sequence_classification", labels=labels)
    torch.testing.assert_close(loss, cross_entropy(output.logits[::2], labels[::2]))


def test_numbers_without_a_label_are_left_out():
    labels = torch.tensor([0.5, NAN, -1.0, NAN])
    loss, output = loss_of("sequence_classification", labels=labels)
    torch.testing.assert_close(loss, mse_loss(output.logits[::2, 0], labels[::2]))
    loss.backward()


def test_answers_without_a_place_are_left_out():
    places = torch.tensor([2, BEYOND, 3, BEYOND])
    loss, output = loss_of("question_answering", start_positions=places, end_positions=places)
    sides = [cross_entropy(side[::2], places[::2]) for side in (output.start_logits, output.end_logits)]
    torch.testing.assert_close(loss, sum(sides) / 2)
