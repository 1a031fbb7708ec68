"""A run that cannot fit says so; one that only others leave no room for is warned of."""

import logging

import pytest
import torch

import makd
from makd.errors import MakdError, RoomError
from makd.factorization.room import Available, Room
from makd.factorization.settings import FactorizeConfig
from makd.forecasting.fit import check_fits, check_memory
from makd.forecasting.memory import Memory
from makd.forecasting.operations import TextShape
from makd.forecasting.student import forecast_factorization
from tests.models import tiny

GIB = 2**30
PLENTY = Room("this machine", 100 * GIB, 50 * GIB)


@pytest.fixture(scope="module")
def forecast():
    model = tiny("llama")
    text = TextShape(((8, 16),) * 4)
    return forecast_factorization(model, makd.resolve(model), makd.Budget(keep_linears=0.5), FactorizeConfig(), text)


def test_what_fits_is_not_spoken_of(forecast, caplog):
    with caplog.at_level(logging.WARNING, logger="makd"):
        check_fits(forecast, Available(PLENTY, PLENTY))
    assert not caplog.records


def test_what_the_system_does_not_tell_is_not_asked_for(forecast):
    check_fits(forecast, Available(Room("this machine", None), PLENTY))


def test_more_memory_than_there_is_is_refused_with_figures_and_advice(forecast):
    with pytest.raises(RoomError, match=r"needs at least [\d.]+ MB of memory .*this machine has 0.0 MB. .*Nothing was"):
        check_fits(forecast, Available(Room("this machine", 1000, 1000), PLENTY))


def test_the_error_is_one_that_the_user_can_mend_and_pythons_own():
    assert issubclass(RoomError, MakdError)
    assert issubclass(RoomError, MemoryError)


def test_what_may_be_forecast_too_large_is_not_refused(forecast, caplog):
    phase = Memory("a phase", weights=100, moments=300)
    little = Room("this machine", 300, 300)
    with caplog.at_level(logging.WARNING, logger="makd"):
        check_memory([phase], 0, Available(little, PLENTY))
    assert "of what this machine has" in caplog.text
    with pytest.raises(RoomError):
        check_memory([phase], 0, Available(Room("this machine", 299, 299), PLENTY))
    with pytest.raises(RoomError):
        check_memory([Memory("a phase", weights=400)], 0, Available(little, PLENTY))


def test_memory_that_others_use_now_is_a_warning(forecast, caplog):
    with caplog.at_level(logging.WARNING, logger="makd"):
        check_fits(forecast, Available(Room("this machine", 100 * GIB, 1000), PLENTY))
    assert "are free now" in caplog.text


def test_a_full_disk_is_refused(forecast):
    with pytest.raises(RoomError, match="of disk, and the disk of runs has"):
        check_fits(forecast, Available(PLENTY, Room("the disk of runs", 1000, 1000)))


def test_an_accelerator_holds_all_but_the_store(forecast):
    stored = forecast.store_bytes
    enough = Room("a card", max(phase.least - min(stored, phase.states) for phase in forecast.phases), GIB)
    check_fits(forecast, Available(Room("this machine", stored, stored), PLENTY, enough))
    with pytest.raises(RoomError, match="hidden states"):
        check_fits(forecast, Available(Room("this machine", stored - 1, 0), PLENTY, enough))
    with pytest.raises(RoomError, match="a card has"):
        check_fits(forecast, Available(PLENTY, PLENTY, Room("a card", enough.size - 1, GIB)))


@pytest.mark.parametrize(
    ("largest", "advice"),
    [
        ("weights", "--stream"),
        ("states", "recipe.calibration.rows"),
        ("moments", "recipe.factorize.solver"),
        ("decompositions", "recipe.factorize.solver"),
        ("activations", "recipe.calibration.batch_size"),
    ],
)
def test_the_advice_is_about_what_is_largest(forecast, largest, advice):
    phase = Memory("a phase", **{largest: 200 * GIB})
    with pytest.raises(RoomError, match=advice):
        check_fits(forecast, Available(PLENTY, PLENTY), [phase])


def test_a_training_that_does_not_fit_is_refused_with_advice_of_its_own(forecast):
    with pytest.raises(RoomError, match=r"recipe\.training\.trainable"):
        check_fits(forecast, Available(PLENTY, PLENTY), [Memory("training", weights=200 * GIB)])
    with pytest.raises(RoomError, match=r"recipe\.training\.batch_size"):
        check_fits(forecast, Available(PLENTY, PLENTY), [Memory("training", activations=200 * GIB)])


def test_the_dtype_of_the_student_on_disk_counts():
    model = tiny("llama").to(torch.float32)
    settings = FactorizeConfig(solver="svd"), TextShape()
    budget = makd.Budget(keep_linears=0.5)
    wide, narrow = (
        forecast_factorization(model, makd.resolve(model), budget, *settings, save_itemsize=itemsize)
        for itemsize in (None, 2)
    )
    assert wide.output_bytes == 2 * narrow.output_bytes
