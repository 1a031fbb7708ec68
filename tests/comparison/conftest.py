"""A comparison that was run, for the tests of all of its modules."""

import pytest

import makd
from makd.comparison.setup import prepare_setup
from tests.comparison.experiments import SIMILAR, make, quiet
from tests.tasks.test_tasks import PAIRS, write


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder / "mrpc", train=PAIRS, validation=PAIRS[:6])
    write(folder / "stsb", train=SIMILAR, validation=SIMILAR[:6])
    return folder


@pytest.fixture(scope="session")
def done(data, encoder_folder, tmp_path_factory):
    """Two tasks, two methods and two seeds, all run."""
    experiment = make(data, encoder_folder, tmp_path_factory.mktemp("runs") / "whole")
    return experiment, makd.compare(experiment)


@pytest.fixture(scope="session")
def setup(done):
    """Of the first task and seed."""
    return prepare_setup(done[0], done[0].tasks[0], 1, quiet)
