"""Many matrices at once: the same results in the same order, whatever the number of threads."""

import pytest
import torch

from makd.solvers.parallel import map_on_cores


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items(threads):
    assert list(map_on_cores(lambda number: number * 2, range(20))) == list(range(0, 40, 2))


def test_each_result_is_that_of_one_thread_and_the_setting_is_as_before(threads):
    matrices = [torch.randn(70, 70, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    found = list(map_on_cores(lambda matrix: torch.linalg.eigh(matrix @ matrix.T)[1], matrices))
    assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    for matrix, vectors in zip(matrices, found, strict=True):
        assert torch.equal(torch.linalg.eigh(matrix @ matrix.T)[1], vectors)


def test_an_error_of_one_item_is_raised(threads):
    def fail(number):
        if number == 3:
            raise ValueError("three")
        return number

    with pytest.raises(ValueError, match="three"):
        list(map_on_cores(fail, range(6)))
    assert torch.get_num_threads() == threads
