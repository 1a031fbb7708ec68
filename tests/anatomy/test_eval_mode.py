"""Forwards that measure leave every module in the mode that it had."""

import pytest

from makd.anatomy.eval_mode import in_eval
from tests.models import tiny


def modes(model):
    return [module.training for module in model.modules()]


@pytest.fixture
def model():
    """In training, but for one layer."""
    model = tiny("bert").train()
    model.encoder.layer[0].eval()
    return model


def test_inside_all_are_in_eval_mode_and_afterwards_as_they_were(model):
    before = modes(model)
    assert len(set(before)) == 2
    with in_eval(model):
        assert not any(modes(model))
    assert modes(model) == before


def test_after_an_error_they_are_as_they_were_too(model):
    before = modes(model)
    with pytest.raises(ZeroDivisionError), in_eval(model):
        1 / 0  # noqa: B018
    assert modes(model) == before
