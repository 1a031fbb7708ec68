"""A forward that is replaced for a while is back afterwards, wherever it stood."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from makd.anatomy.replaced_forward import replaced_forward
from makd.calibration.replay import outputs_known

ONES = torch.ones(2, 3)


class Doubling(ModelHook):
    """What accelerate's hooks do: a forward of the instance, around the class's."""

    def post_forward(self, module, output):
        return 2 * output


def test_a_call_inside_runs_the_other_forward():
    module = nn.Identity()
    with replaced_forward(module, lambda hidden: hidden + 1):
        assert torch.equal(module(ONES), ONES + 1)
    assert torch.equal(module(ONES), ONES)
    assert "forward" not in vars(module)


def test_a_hook_of_accelerate_is_there_again_after_the_block():
    module = add_hook_to_module(nn.Identity(), Doubling())
    with replaced_forward(module, lambda hidden: hidden):
        assert torch.equal(module(ONES), ONES)
    assert torch.equal(module(ONES), 2 * ONES)


def test_a_hook_is_there_again_after_an_error():
    module = add_hook_to_module(nn.Identity(), Doubling())
    with pytest.raises(ZeroDivisionError), replaced_forward(module, lambda hidden: 1 / 0):
        module(ONES)
    assert torch.equal(module(ONES), 2 * ONES)


def test_a_linear_whose_output_is_known_keeps_its_hook():
    model = nn.ModuleDict({"linear": add_hook_to_module(nn.Linear(3, 3), Doubling())})
    expected = model["linear"](ONES)
    with outputs_known(model, {"linear": ONES}):
        assert torch.equal(model["linear"](ONES), ONES)
        assert torch.equal(model["linear"](ONES), expected)
    assert torch.equal(model["linear"](ONES), expected)
