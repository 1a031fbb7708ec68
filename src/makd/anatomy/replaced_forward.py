"""Station 1: another forward in a module's place for a while, and its own again afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside the block a call of `module` runs `forward`; afterwards, after an error too, what it ran before.

    That may be a forward of the instance, as accelerate's hooks put it there for offloaded and spread-out models: it is
    put back, where deleting the replacement would leave the class's and lose the hook.
    """
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        if before is not None:
            module.forward = before
