"""Station 1: forwards without dropout. Every forward that measures is one."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval(*modules: nn.Module) -> Iterator[None]:
    """Inside, these and all their parts are in eval mode; afterwards, after an error too, in the mode that each had."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
