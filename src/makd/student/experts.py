"""What a student has in the place of a module of routed experts: factors for each expert, or one side for all of them.

    FactoredExperts (in the place of the architecture's module)
      gate_up_proj: FactoredStack (reduce: A of each expert; expand: B of each)
      down_proj: the same, or the architecture's own parameter where it stays dense

Tokens are routed by the architecture's own code. Experts are run one after the other.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from makd.anatomy import ExpertStack, StandIn
from makd.anatomy.routed import dense_product, run_experts
from makd.solvers.stacks import Side, StackFactors


class _Factors(nn.Module):
    """One factor of every expert, or one for all.

    It is read by a call: what offloads a model fetches the weights of a module when that is called, and only then.
    """

    def __init__(self, shape: tuple[int, int, int], device: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def forward(self) -> Float[Tensor, "one_or_all out inp"]:
        """The factor."""
        return self.weight


def highest_rank(out_features: int, in_features: int, shared: Side) -> int:
    """Of the factors of experts: one A or B for all may have more directions than any of them uses."""
    return {"": min(out_features, in_features), "reduce": in_features, "expand": out_features}[shared]


class FactoredStack(StandIn):
    """W_e ~ B_e A_e of all experts: A `reduce` (experts, rank, in), B `expand` (experts, out, rank).

    One of them may be the same for all, and stands there once. A bias stays where the architecture has it.
    """

    def __init__(
        self,
        experts: int,
        out_features: int,
        in_features: int,
        rank: int,
        shared: Side = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Factors without a start.

        Raises:
            ValueError: `rank` is not possible.
        """
        super().__init__(stands_for="")
        highest = highest_rank(out_features, in_features, shared)
        if not 1 <= rank <= highest:
            raise ValueError(f"rank is in 1..{highest} for experts of {out_features} x {in_features}; got {rank}.")
        self.experts, self.out_features, self.in_features = experts, out_features, in_features
        self.rank, self.shared = rank, shared
        self.reduce = _Factors((1 if shared == "reduce" else experts, rank, in_features), device, dtype)
        self.expand = _Factors((1 if shared == "expand" else experts, out_features, rank), device, dtype)

    def forward(self) -> StackFactors:
        """Both factors of all experts."""
        return StackFactors(expand=self.expand(), reduce=self.reduce())

    def dense_weight(self) -> Float[Tensor, "experts out inp"]:
        """B_e A_e of all experts."""
        product = self.expand.weight @ self.reduce.weight
        return product.expand(self.experts, -1, -1)

    def extra_repr(self) -> str:
        """What `print(model)` says of it."""
        one = {"": "", "reduce": ", one A", "expand": ", one B"}[self.shared]
        return f"experts={self.experts}, {self.in_features} -> {self.out_features}, rank={self.rank}{one}"


class FactoredExperts(nn.Module):
    """A module of routed experts, some of whose stacks are in factors; all else of it is the architecture's."""

    architecture: type[nn.Module]

    @classmethod
    def in_place_of(cls, module: nn.Module) -> "FactoredExperts":
        """With everything that `module` has; its stacks are still dense."""
        if isinstance(module, FactoredExperts):
            return module
        found = cls()
        _take_over_(found, module)
        found.architecture = type(module)
        return found

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """What the architecture's module gives, by the factors."""
        # once for all experts: a call may bring a stack's weights from elsewhere
        factors = {leaf: stack() for leaf, stack in self.named_children() if isinstance(stack, FactoredStack)}

        def multiply(leaf: str, expert: int, rows: Tensor, _tokens: Tensor) -> Tensor:
            if leaf not in factors:
                return dense_product(self, leaf, expert, rows)
            bias = getattr(self, f"{leaf}_bias", None)
            output = _product(factors[leaf], expert, rows)
            return output if bias is None else output + bias[expert]

        return run_experts(self, multiply, *arguments, **named)


def _product(factors: StackFactors, expert: int, rows: Float[Tensor, "rows inp"]) -> Float[Tensor, "rows out"]:
    """B_e (A_e x)."""
    reduce, expand = (side[expert if len(side) > 1 else 0] for side in (factors.reduce, factors.expand))
    return nn.functional.linear(nn.functional.linear(rows, reduce), expand)


def place_stack_(model: nn.Module, stack: ExpertStack, factored: FactoredStack) -> None:
    """Put factors in the place of a dense stack of `model`."""
    module = FactoredExperts.in_place_of(model.get_submodule(stack.module))
    module.train(model.get_submodule(stack.module).training)
    factored.train(module.training)
    if stack.leaf in module._parameters:
        del module._parameters[stack.leaf]
    module.add_module(stack.leaf, factored)
    model.set_submodule(stack.module, module)


@torch.no_grad()
def replace_stack_(model: nn.Module, stack: ExpertStack, factors: StackFactors, shared: Side) -> None:
    """Put these factors in the place of a dense stack of `model`."""
    rank = factors.reduce.shape[1]
    device, dtype = factors.expand.device, factors.expand.dtype
    factored = FactoredStack(
        stack.experts, stack.out_features, stack.in_features, rank, shared, device=device, dtype=dtype
    )
    factored.reduce.weight.copy_(factors.reduce)
    factored.expand.weight.copy_(factors.expand)
    place_stack_(model, stack, factored)


@torch.no_grad()
def fold_stack_(model: nn.Module, name: str) -> None:
    """Make a factored stack of `model` dense again; the architecture's own module is back with its last one."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    factored = module.get_submodule(leaf)
    assert isinstance(module, FactoredExperts)
    assert isinstance(factored, FactoredStack)
    weight = factored.dense_weight()
    weight = weight.transpose(1, 2) if getattr(module, "is_transposed", True) else weight
    del module._modules[leaf]
    module.register_parameter(leaf, nn.Parameter(weight.contiguous(), factored.expand.weight.requires_grad))
    if not any(isinstance(part, FactoredStack) for part in module.children()):
        plain = module.architecture.__new__(module.architecture)
        nn.Module.__init__(plain)
        _take_over_(plain, module)
        del plain.architecture
        model.set_submodule(owner, plain)


def _take_over_(target: nn.Module, source: nn.Module) -> None:
    """Parameters, buffers, parts and settings of a module, by reference."""
    registries = ("_parameters", "_buffers", "_modules")
    for key, value in vars(source).items():
        if key in registries:
            target.__dict__[key] = type(value)(value)
        elif not key.startswith("_") or key == "_is_expert_parallel":
            target.__dict__[key] = value
    target.__dict__["_non_persistent_buffers_set"] = set(source._non_persistent_buffers_set)
