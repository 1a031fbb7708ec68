"""The product A x of linears that share one A, computed once for all of them.

The architecture's code calls the linears one by one and knows nothing of this. `linear` asks here.
"""

import weakref

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef


class SharedProduct:
    """A x of the last x, for those linears of a group that have not asked for it yet.

    Each linear gets it once, and only for the very tensor x that it was computed from: the same object, not written to
    since (torch counts), with the same A, in the same mode of autograd and autocast. Anything else is computed anew: a
    linear that is called with another input, or twice, or alone, gives what it would give without sharing. A backward
    through the product ends its use, since its graph may be gone. Inference tensors do not count writes, and are not
    shared.
    """

    def __init__(self, members: int) -> None:
        """For a group of so many linears."""
        self.members = members
        self._inputs: TensorWeakRef | None = None
        self._state: tuple[object, ...] = ()
        self._served: set[nn.Module] = set()
        self._product: Tensor | None = None

    def __reduce__(self) -> tuple[type["SharedProduct"], tuple[int]]:
        """Copies and pickles of a model begin without a product."""
        return SharedProduct, (self.members,)

    def of(self, reduce: nn.Module, inputs: Tensor, member: nn.Module) -> Tensor:
        """A x for one of the linears, `member`."""
        weight = reduce.weight if type(reduce) is nn.Linear else None
        if weight is None or torch.compiler.is_compiling() or inputs.is_inference() or weight.is_inference():
            # a compiler finds the common product by itself; an adapter in the place of A may change in unseen ways
            product: Tensor = reduce(inputs)
            return product
        state = (inputs._version, id(weight), weight._version, weight.data_ptr(), *_modes(inputs.device.type))
        found = self._product
        if (
            found is not None
            and self._inputs is not None
            and self._inputs() is inputs
            and self._state == state
            and member not in self._served
        ):
            self._served.add(member)
            if len(self._served) == self.members:
                self.forget()
            return found
        product = reduce(inputs)
        self._inputs, self._state, self._served, self._product = TensorWeakRef(inputs), state, {member}, product
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
        self._product = self._inputs = None


def _modes(device: str) -> tuple[bool, torch.dtype | None]:
    """What decides how a product is computed and recorded, besides its factors."""
    return torch.is_grad_enabled(), torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
