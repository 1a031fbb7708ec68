"""The layer that a student has in the place of a teacher's linear.

Stands between the solvers, which make its factors, and `hub`, which saves and loads it.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from makd.anatomy import StandIn, is_adapted
from makd.errors import UnsupportedModelError
from makd.solvers.factors import Factors
from makd.student.shared_product import SharedProduct


class LowRankLinear(StandIn):
    """y = expand(reduce(x)): W ~ B A with A `reduce` (rank, in) and B `expand` (out, rank), and W's bias.

    Both factors are plain `nn.Linear`, so whatever works on linears (quantizers, exporters; adapters, by the names that
    `adapter_targets` gives) works on them.
    It has rank · (in + out) weights, fewer than W as long as rank < in · out / (in + out).
    """

    tied = False
    """Whether its factors are those of the token embeddings."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        shared: bool = False,
    ) -> None:
        """Factors with nn.Linear's random start; `from_factors` makes a layer with solved ones.

        Args:
            in_features: width of x.
            out_features: width of y.
            rank: rows of A.
            bias: whether there is one.
            device: of the factors.
            dtype: of the factors.
            shared: whether other linears will use the same A; `rank` may then be above `out_features`.

        Raises:
            ValueError: `rank` is not in 1..min(in_features, out_features).
        """
        super().__init__()
        highest = in_features if shared else min(in_features, out_features)
        if not 1 <= rank <= highest:
            raise ValueError(f"rank is in 1..{highest} for {out_features} x {in_features}; got {rank}.")
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.reduce = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.expand = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.shared: SharedProduct | None = None

    @staticmethod
    def from_factors(factors: Factors, bias: Float[Tensor, " out"] | None, shared: bool = False) -> "LowRankLinear":
        """The layer with these factors, in their dtype and on their device; `bias` is the teacher's own.

        A bias that the solver refitted (`factors.bias`) goes before `bias`.
        """
        bias = factors.bias if factors.bias is not None else bias
        (out_features, rank), in_features = factors.expand.shape, factors.reduce.shape[1]
        device, dtype = factors.expand.device, factors.expand.dtype
        layer = LowRankLinear(in_features, out_features, rank, bias is not None, device, dtype, shared)
        with torch.no_grad():
            layer.reduce.weight.copy_(factors.reduce)
            layer.expand.weight.copy_(factors.expand)
            if bias is not None:
                layer.expand.bias.copy_(bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """The factor that writes the output: for code that reads a linear's dtype or device off its weight (T5)."""
        return self.expand.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias (out,), if there is one."""
        return self.expand.bias

    def dense_weight(self) -> Float[Tensor, "out inp"]:
        """B A, the matrix that the factors stand for."""
        return self.expand.weight @ self.reduce.weight

    def __setattr__(self, name: str, value: Any) -> None:
        """A module's, which peft uses to put an adapter where a factor was.

        Raises:
            UnsupportedModelError: the token embeddings have that factor too.
        """
        if self.tied and is_adapted(value):
            raise used_twice()
        super().__setattr__(name, value)

    def forward(self, inputs: Float[Tensor, "*batch inp"]) -> Float[Tensor, "*batch out"]:
        """B (A x) + b."""
        product = self.reduce(inputs) if self.shared is None else self.shared.of(self.reduce, inputs, self)
        output: Tensor = self.expand(product)
        return output

    def extra_repr(self) -> str:
        """What `print(model)` says of it."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def used_twice() -> UnsupportedModelError:
    """The error for an adapter on weights that embeddings and head both have."""
    return UnsupportedModelError(
        "An adapter (LoRA or a relative) is to go on weights of the token embeddings that are used in a second place: "
        "it would act in one and be merged into both. Leave embeddings and LM head out of what is adapted: "
        'LoraConfig(target_modules=makd.adapter_targets(student, "all-linear")), say.'
    )


def dense_weight(linear: nn.Module) -> Float[Tensor, "out inp"]:
    """The weight (out, in) of a dense linear, without gradient; transformers' Conv1D keeps it the other way round."""
    weight = linear.get_parameter("weight").detach()
    return weight.T if isinstance(linear, Conv1D) else weight
