"""Station 7: a student in pieces, as FSDP2 trains it: its backward, and how it becomes whole again.

FSDP makes a layer's weights whole once the layer's output gets a gradient. A loss that is made inside the layers may
leave the last ones' outputs without any, and their weights in pieces.
"""

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from makd.distill.engines import is_sharding_asked
from makd.processes.first import from_first


@contextmanager
def in_pieces(student: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """What to train in the place of `student`, which has learned the same after the block.

    Without FSDP it is the student itself. With it, which takes a model apart for good, it is a copy, and the student
    waits in the host's memory.
    """
    if not is_sharding_asked():
        yield student
        return
    device = student.device
    nn.Module.to(student, "cpu")
    pieces = copy.deepcopy(student)
    yield pieces
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(pieces, options=options)  # of the first process alone
    student.load_state_dict(from_first(lambda: state))
    nn.Module.to(student, device)


def hold_head(model: PreTrainedModel) -> None:
    """Under DeepSpeed's third stage, let the head's weights be whole as long as the model's own forward runs.

    By itself DeepSpeed has them whole while the head runs, and the losses read them afterwards.
    """
    for weight in model.get_output_embeddings().parameters():
        if hasattr(weight, "ds_id") and weight.ds_id not in getattr(model, "_external_params", {}):
            deepspeed: Any = importlib.import_module("deepspeed")
            deepspeed.zero.register_external_parameter(model, weight)


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
