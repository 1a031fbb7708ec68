"""Station 7: student and teacher are two models. What both share would be learned from while it changes."""

from torch import nn
from torch.distributed.tensor import DTensor

from makd.errors import SettingError


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a `student` whose training would change the `teacher`: parts that are frozen may be of both.

    Raises:
        SettingError: they are one model, or a parameter that learns is a parameter of the teacher's, or lies in its
            memory.
    """
    advice = "Give the student a copy of its own (copy.deepcopy)"
    if student is teacher:
        raise SettingError(
            f"Student and teacher are one {type(student).__name__}, which would learn from itself while it changes; a "
            f"PeftModel changes the model that it is given. {advice}, or make one with makd.factorize."
        )
    theirs = {_memory(weight): name for name, weight in teacher.named_parameters()}
    for name, weight in student.named_parameters():
        if weight.requires_grad and _memory(weight) in theirs:
            raise SettingError(
                f"The student's {name} is the teacher's {theirs[_memory(weight)]}, so training would change the "
                f"teacher, too. {advice}, or freeze what both share (requires_grad_(False))."
            )


def _memory(weight: nn.Parameter) -> tuple[object, int]:
    """Equal for tensors that lie in the same memory; one that has none (on the meta device) equals itself alone."""
    own = weight.to_local() if isinstance(weight, DTensor) else weight
    place = own.untyped_storage().data_ptr()
    return (own.device, place) if place else (None, id(weight))
