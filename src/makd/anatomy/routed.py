"""Station 1: how routed experts are run, one after the other, whatever multiplies by their matrices.

A student's factored experts are run so, and a teacher's while calibration looks at what each of them reads.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from makd.anatomy.experts import takes_rows_by_expert

Multiply = Callable[[str, int, Tensor, Tensor], Tensor]
"""Name of the stack in the module, expert, its rows, which tokens these are -> rows, with the expert's bias."""


def run_experts(module: nn.Module, multiply: Multiply, *arguments: Any, **named: Any) -> Tensor:
    """What a module of routed experts gives, for what it is called with.

    Args:
        module: of an architecture, or a student's in its place (`architecture` is then the class of the former).
        multiply: makes the products.
        *arguments: of the module's forward.
        **named: of the module's forward.
    """
    cls: Any = getattr(module, "architecture", type(module))
    given = list(inspect.signature(cls.forward).bind(module, *arguments, **named).arguments.values())[1:]
    first = "gate_up_proj" if hasattr(module, "gate_up_proj") else "up_proj"

    def expert(index: int, rows: Tensor, tokens: Tensor) -> Tensor:
        inner = _activate(cls, module, multiply(first, index, rows, tokens))
        return multiply("down_proj", index, inner, tokens)

    if takes_rows_by_expert(module):
        return _by_rows(expert, given[0], int(module.num_experts))  # type: ignore[arg-type]
    hidden, indices, weights = given
    return _by_index(expert, hidden, indices, weights, int(module.num_experts))  # type: ignore[arg-type]


def _by_index(
    expert: Callable[[int, Tensor, Tensor], Tensor],
    hidden: Float[Tensor, "tokens hidden"],
    indices: Int[Tensor, "tokens chosen"],
    weights: Float[Tensor, "tokens chosen"],
    count: int,
) -> Float[Tensor, "tokens hidden"]:
    """Sum over the experts that each token has chosen, weighted."""
    total = torch.zeros_like(hidden)
    for index in torch.unique(indices).tolist():
        if not 0 <= index < count:  # stands for no expert
            continue
        tokens, place = torch.where(indices == index)
        output = expert(index, hidden[tokens], tokens) * weights[tokens, place, None]
        total.index_add_(0, tokens, output.to(total.dtype))
    return total


def _by_rows(
    expert: Callable[[int, Tensor, Tensor], Tensor], hidden: Float[Tensor, "rows hidden"], count: int
) -> Float[Tensor, "rows hidden"]:
    """Rows of every token for each expert, the first's before the next's; zeros where it was not chosen."""
    parts = []
    for index, rows in enumerate(hidden.view(count, -1, hidden.shape[-1])):
        (tokens,) = torch.where(rows.detach().any(-1))
        output = torch.zeros_like(rows)
        if len(tokens):
            output = output.index_add(0, tokens, expert(index, rows[tokens], tokens).to(rows.dtype))
        parts.append(output)
    return torch.cat(parts)


def _activate(cls: Any, module: Any, first: Tensor) -> Tensor:
    if not getattr(module, "has_gate", True):
        activated: Tensor = module.act_fn(first)
        return activated
    if hasattr(cls, "_apply_gate"):
        gated: Tensor = cls._apply_gate(module, first)
        return gated
    gate, up = first.chunk(2, dim=-1)
    product: Tensor = up * module.act_fn(gate)
    return product


def dense_expert(module: nn.Module, leaf: str, expert: int) -> Float[Tensor, "out inp"]:
    """The weight (out, in) of one expert of a dense stack, however the architecture keeps it."""
    weight = module.get_parameter(leaf)[expert]
    return weight.T if getattr(module, "is_transposed", True) else weight


def dense_product(
    module: nn.Module, leaf: str, expert: int, rows: Float[Tensor, "rows inp"]
) -> Float[Tensor, "rows out"]:
    """What an expert's dense matrix makes of its rows, with its bias."""
    bias = getattr(module, f"{leaf}_bias", None)
    return nn.functional.linear(rows, dense_expert(module, leaf, expert), None if bias is None else bias[expert])
