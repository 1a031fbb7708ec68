"""The product A x of linears that share one A, computed once for all of them.

The architecture's code calls the linears one by one and knows nothing of this. `linear` asks here.
"""

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef


@dataclass(frozen=True)
class _Waiting:
    """A product that some of the linears may still ask for."""

    inputs: TensorWeakRef
    state: tuple[object, ...]
    """Of all that the product depends on, when it was computed."""
    product: Tensor
    served: set[nn.Module] = field(default_factory=set)


class SharedProduct:
    """A x of the last x, for those linears of a group that have not asked for it yet.

    Each linear gets it once, and only for the very tensor x that it was computed from: the same object, not written to
    since (torch counts), with the same A, in the same mode of autograd and autocast. Anything else is computed anew: a
    linear that is called with another input, or twice, or alone, gives what it would give without sharing. A backward
    through the product ends its use, since its graph may be gone. Inference tensors do not count writes, and are not
    shared. Threads that call one model with inputs of their own disturb each other's sharing, not their results.
    """

    def __init__(self, members: int) -> None:
        """For a group of so many linears."""
        self.members = members
        self._waiting: _Waiting | None = None  # replaced as a whole: other threads see one or the other

    def __reduce__(self) -> tuple[type["SharedProduct"], tuple[int]]:
        """Copies and pickles of a model begin without a product."""
        return SharedProduct, (self.members,)

    def of(self, reduce: nn.Module, inputs: Tensor, member: nn.Module) -> Tensor:
        """A x for one of the linears, `member`."""
        # a compiler gets plain products; an adapter in the place of A may change in unseen ways
        plain = torch.compiler.is_compiling() or type(reduce) is not nn.Linear
        state = None if plain else _state(reduce.weight, inputs)  # type: ignore[arg-type]
        if state is None:
            product: Tensor = reduce(inputs)
            return product
        waiting = self._waiting
        if (
            waiting is not None
            and waiting.inputs() is inputs
            and waiting.state == state
            and member not in waiting.served
        ):
            waiting.served.add(member)
            if len(waiting.served) == self.members:
                self.forget()
            return waiting.product
        product = reduce(inputs)
        self._waiting = _Waiting(TensorWeakRef(inputs), state, product, {member})
        if product.requires_grad:
            mine = weakref.ref(self)  # else the product would keep itself

            def end_use(_gradient: Tensor) -> None:
                shared = mine()
                if shared is not None:
                    shared.forget()

            product.register_hook(end_use)
        return product

    def forget(self) -> None:
        """Let go of the product."""
        self._waiting = None


def _state(weight: Tensor, inputs: Tensor) -> tuple[object, ...] | None:
    """What the product of these depends on besides the objects; None where torch cannot tell."""
    if inputs.is_inference() or weight.is_inference():
        return None
    device = inputs.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    try:
        versions = (inputs._version, weight._version, weight.data_ptr())
    except RuntimeError:  # tensors without memory: fake ones, those of a vmap, parts that other processes hold
        return None
    return (id(weight), *versions, torch.is_grad_enabled(), autocast)
