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
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer

from makd.anatomy import Anatomy
from makd.aspects import ActivePlan
from makd.distill.engines.support import (
    check_same_teacher,
    check_sharded_teacher,
    check_shared,
    is_sharding_asked,
    layer_classes,
    place_teacher_,
)
from makd.errors import SettingError
from makd.processes.first import from_first
from makd.weights.sound import check_in_memory, check_numbers_of


@contextmanager
def in_pieces(student: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """What to train in the place of `student`, which has learned the same after the block.

    Without FSDP it is the student itself. With it, which takes a model apart for good, it is a copy, and the student
    waits in the host's memory.
    """
    if not is_sharding_asked():
        yield student
        return
    with _stand_in(student) as pieces:
        yield pieces
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(pieces, options=options)  # of the first process alone
        student.load_state_dict(from_first(lambda: state))


@contextmanager
def teaching_in_pieces(teacher: PreTrainedModel, shard: bool) -> Iterator[PreTrainedModel]:
    """What to learn from in the place of `teacher`: itself, or, where it is to be sharded, a copy that may be.

    The teacher then waits in the host's memory.
    """
    if not shard:
        yield teacher
        return
    with _stand_in(teacher) as pieces:
        yield pieces


@contextmanager
def _stand_in(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A copy of `model`, which waits in the host's memory meanwhile."""
    device = model.device
    nn.Module.to(model, "cpu")
    yield copy.deepcopy(model)
    nn.Module.to(model, device)


def check_teacher(teacher: PreTrainedModel) -> None:
    """Refuse a teacher whose weights are quantized, or neither in memory nor where accelerate's hooks fetch them.

    Raises:
        ModelLoadError: the teacher is quantized, or some weights are nowhere.
        SettingError: its head is offloaded: the losses read that themselves.
    """
    check_numbers_of(teacher)
    if not any("disk" in str(place) or "cpu" in str(place) for place in getattr(teacher, "hf_device_map", {}).values()):
        check_in_memory(teacher)
        return
    head = teacher.get_output_embeddings()
    if head is not None and any(weight.is_meta for weight in head.parameters()):
        raise SettingError(
            f"The head of {type(teacher).__name__} is offloaded, and the losses read its weights. Let the device_map "
            "keep the head (and embeddings tied to it) on a device."
        )


def settle_teacher_(
    trainer: Trainer, teacher: PreTrainedModel, anatomy: Anatomy, plan: ActivePlan, shard: bool
) -> PreTrainedModel:
    """Put a teacher where it teaches from: whole in each process, where its `device_map` says, or in pieces.

    Args:
        trainer: with the student.
        teacher: changed in place; in eval mode afterwards.
        anatomy: of the teacher.
        plan: aspects.
        shard: whether it is spread over the processes by FSDP2, for good, as accelerate does with the student.

    Raises:
        SettingError: it is not the same in all processes, or is to be sharded and cannot be.
    """
    check_same_teacher(teacher)
    if shard:
        check_sharded_teacher(trainer.is_fsdp_enabled, plan.completions)
        _shard_(trainer, teacher, anatomy)
    else:
        place_teacher_(teacher, trainer.args.device)
    teacher.eval()
    return teacher


def _shard_(trainer: Trainer, teacher: PreTrainedModel, anatomy: Anatomy) -> None:
    check_shared(teacher)
    teacher.requires_grad_(False)
    plugin = trainer.accelerator.state.fsdp_plugin
    of_student = plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = layer_classes(teacher, anatomy)
    fsdp2_prepare_model(trainer.accelerator, teacher)
    plugin.transformer_cls_names_to_wrap, plugin.auto_wrap_policy = of_student


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
