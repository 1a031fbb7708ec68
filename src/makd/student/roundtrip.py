"""Whether a student of this model could be saved and loaded again, found out before there is one.

transformers renames, splits and joins tensors of some architectures on their way between file and memory. What it would
do to a student's is played through here by name, with tensors that take no memory.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from makd.anatomy import Anatomy
from makd.errors import UnsupportedModelError
from makd.student.config import StudentConfig
from makd.student.hub import describe_student
from makd.student.identity import names_in_memory, saved_tensors
from makd.student.placing import place_stand_ins_


def check_round_trip(teacher: PreTrainedModel, anatomy: Anatomy) -> None:
    """Refuse a `teacher` whose student's tensors would not keep their names through saving and loading.

    Args:
        teacher: perhaps empty. It is not changed.
        anatomy: of `teacher`, with what a student may have factors of.

    Raises:
        UnsupportedModelError: a tensor would be lost, or could not be saved.
    """
    student = _empty_student(teacher, anatomy)
    written = saved_tensors(student)
    try:
        files = revert_weight_conversion(student, written)
    except Exception as error:
        raise UnsupportedModelError(
            f"A student of {type(teacher).__name__} could not be saved: transformers cannot name its tensors ({error})."
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in files.items()}
    lost = sorted(written.keys() ^ names_in_memory(shapes, student).keys())
    if lost:
        raise UnsupportedModelError(
            f"A student of {type(teacher).__name__} could be saved but not loaded again: transformers would look for "
            f"{lost[0]!r} (and {len(lost) - 1} other tensors) in vain. Nothing was computed."
        )


def _empty_student(teacher: PreTrainedModel, anatomy: Anatomy) -> PreTrainedModel:
    """A copy of `teacher` whose tensors take no memory, with factors of rank 1 wherever there may be any."""
    tensors = [*teacher.parameters(), *teacher.buffers()]
    empty = {
        id(tensor): nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else torch.empty_like(tensor, device="meta")
        for tensor in tensors
    }
    student = copy.deepcopy(teacher, dict(empty))
    counts = {"total": 0, "factored": 0, "vocabulary": 0}
    with torch.device("meta"):
        ranks = dict.fromkeys(anatomy.linears, 1)
        experts: dict[str, dict[str, int | str]] = {stack.name: {"rank": 1, "shared": ""} for stack in anatomy.stacks}
        config = StudentConfig(ranks, counts, type(teacher).__name__, experts=experts, identity="0" * 16)
        place_stand_ins_(student, config)
    describe_student(student, "0" * 16)
    return student
