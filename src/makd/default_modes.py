"""torch's modes as they are before anybody sets one. Stands below every station.

Notebooks wrap whole cells in autocast or in inference mode. What is computed inside would be rounded otherwise, or
would have no gradients; makd has settings of its own for what is to be in which precision.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def default_modes() -> Iterator[None]:
    """Inside, no autocast and no inference mode of the caller's is on, and gradients are; afterwards all as before.

    It decorates functions, too. torch is not imported for it: without it there are no modes.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", "cpu" if accelerator is None else accelerator.type}
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))  # switches gradients on as well
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                modes.enter_context(torch.autocast(kind, enabled=False))
        yield
