"""The states of the random numbers of Python, numpy and torch. Stands below every station.

A run seeds them for itself. Whoever called it draws on afterwards as if it had not been: an evaluation between two
epochs of a training changes neither their order nor their dropout.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def read_host_states() -> dict[str, Any]:
    """The states of all generators of this process but accelerators'."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}


def set_host_states(states: Mapping[str, Any]) -> None:
    """Let the generators go on from what `read_host_states` gave; other entries are not looked at."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])


@contextmanager
def keeping_random_state() -> Iterator[None]:
    """After the block, or a function that this decorates, all random numbers go on as if it had not been."""
    states = read_host_states()
    accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        set_host_states(states)
        if accelerators is not None:
            torch.cuda.set_rng_state_all(accelerators)
        elif torch.cuda.is_available():  # as those begin that were not in use: asking them would have begun their use
            torch.cuda.manual_seed_all(torch.initial_seed())
