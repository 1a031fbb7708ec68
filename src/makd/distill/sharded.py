"""Station 7: what FSDP has to see of a backward: a layer's weights are whole once its output gets a gradient.

A loss that is made inside the layers may leave the last ones' outputs without any, and their weights in pieces.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule


def reaching_output(model: nn.Module, total: Tensor, output: Any) -> Tensor:
    """`total`, whose backward goes through all that a sharded `model` has put out, with a gradient of 0 there.

    Not by adding 0 · output: what stands in padding may be infinite.
    """
    if not isinstance(model, FSDPModule):
        return total
    ends = [one for one in output.values() if isinstance(one, Tensor) and one.requires_grad]
    reached: Tensor = _Reaching.apply(total, *ends)
    return reached


class _Reaching(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, *ends: Tensor) -> Tensor:
        ctx.shapes = [(end.shape, end.dtype, end.device) for end in ends]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, ...]:
        return grad_total, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)
