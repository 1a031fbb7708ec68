"""Station 4: whether routed experts do what makd takes them to do, found out in a forward.

A student's experts, and those that calibration looks at, are run by makd's own code. What an architecture does besides
(a norm, a clamp, another order) would be lost in silence.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy
from makd.anatomy.routed import dense_product, run_experts
from makd.capture.listening import differ


@torch.no_grad()
def faulty_experts(model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Module of routed experts -> why its stacks cannot get factors; of those that give something else than expected.

    Args:
        model: run once.
        anatomy: of `model`; its stacks are dense, or in factors already, which are not looked at.
        inputs: what it is run on.
    """
    faults: dict[str, str] = {}

    def compare(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            def multiply(leaf: str, expert: int, rows: Tensor, _tokens: Tensor) -> Tensor:
                return dense_product(module, leaf, expert, rows)

            try:
                ours = run_experts(module, multiply, *given, **named)
                same = isinstance(output, Tensor) and not differ([ours], [output])
            except (TypeError, ValueError, RuntimeError, IndexError):  # it is called with other things
                same = False
            if not same:
                faults[name] = "they give something else than their matrices alone"

        return hook

    modules = {stack.module: model.get_submodule(stack.module) for stack in anatomy.stacks}
    with ExitStack() as hooks:
        for name, module in modules.items():
            if not hasattr(module, "architecture"):
                hooks.callback(module.register_forward_hook(compare(name), with_kwargs=True).remove)
        if modules:
            (model if anatomy.head is None else model.base_model)(**inputs)
    return faults
