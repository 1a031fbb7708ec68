"""A machine's speed turns counted operations into seconds."""

import pytest
import torch

from makd.forecasting.machine import LAYER_OVERHEAD, MachineSpeed, measure_machine
from makd.forecasting.operations import Operations

SPEED = MachineSpeed(
    products=100.0, single=50.0, double=10.0, eigen=((10, 1.0), (20, 4.0)), elements=1000.0, logits=5.0, beside=2
)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Operations(products=200.0), 2.0),
        (Operations(single=200.0), 4.0),
        (Operations(double=200.0), 20.0),
        (Operations(logits=10.0), 2.0),
        (Operations(elements=1000.0), LAYER_OVERHEAD),
        (Operations(eigen={20: 3.0}), 6.0),
    ],
)
def test_every_kind_of_work_has_its_speed(work, seconds):
    assert SPEED.seconds(work) == pytest.approx(seconds)


def test_eigenvectors_take_the_cube_of_their_number_beyond_what_was_timed():
    assert SPEED.seconds(Operations(eigen={40: 1.0})) == pytest.approx(8 * SPEED.seconds(Operations(eigen={20: 1.0})))


def test_between_the_sizes_that_were_timed_the_curve_goes_through_both():
    assert SPEED.seconds(Operations(eigen={10: 1.0})) == pytest.approx(1.0 / 2)


def test_this_machine_is_timed_and_its_random_numbers_and_threads_stay():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    measure_machine.cache_clear()
    speed = measure_machine(torch.device("cpu"), torch.float32)
    assert min(speed.products, speed.double, speed.elements, speed.logits) > 1e5
    assert speed.eigen[0][1] < speed.eigen[1][1]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
