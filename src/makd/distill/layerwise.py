"""Station 7: the layers of a finished student taught one after the other, models and hidden states in memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy.batches import check_batches
from makd.aspects import Plan, activate
from makd.calibration.replay import note_calls, run_layer
from makd.capture import examine
from makd.distill.layer_lesson import LayerLesson, check_teachable, teach_layer_, without_dropout
from makd.distill.layerwise_settings import LayerwiseConfig
from makd.distill.projections import check_pair
from makd.errors import SettingError


@torch.no_grad()
def teach_layers_(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    plan: Plan,
    batches: Iterable[Mapping[str, Tensor]],
    settings: LayerwiseConfig,
    seed: int = 0,
    on_layer: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[LayerLesson, ...]:
    """Teach each layer of `student`, in place, what the same layer of `teacher` does, in forward order.

    Each layer learns on what the layers before it, already taught, give it.

    Args:
        student: as `makd.factorize` makes it: with the teacher's layers and widths.
        teacher: what is mimicked.
        plan: of which each layer takes the part that is inside it: see `inside_layer`.
        batches: what to learn from, and be judged by; all their hidden states are held, on both sides.
        settings: how long and how fast each layer learns.
        seed: of the order of the batches.
        on_layer: called with the number of layers that are done, and of all.

    Returns:
        What each layer learned; layers that the student has dropped are left out.

    Raises:
        SettingError: the layers cannot be taught one by one, or the models do not line up.
        DataError: there are fewer than two batches.
        NumericsError: a loss is NaN or infinite.
    """
    anatomy, teacher_anatomy = examine(student), examine(teacher)
    given = list(check_batches(batches, student))
    check_teachable(anatomy, given)
    check_pair(anatomy, teacher_anatomy)
    if len(anatomy.layers) != len(teacher_anatomy.layers):
        raise SettingError(
            f"Layers are taught one by one to be what the same layer of the teacher is; the student has "
            f"{len(anatomy.layers)}, the teacher {len(teacher_anatomy.layers)}. Teach the student as a whole: leave "
            "layerwise out of the recipe."
        )
    active = activate(plan, anatomy, teacher_anatomy)
    with without_dropout(student, teacher):
        ours, theirs = ([note_calls(model, anatomy, batch) for batch in given] for model in (student, teacher))
        states, targets = [call.student for call in ours], [call.teacher for call in theirs]
        _check_width(states, targets)
        lessons = []
        for layer in anatomy.layers:
            outputs = [run_layer(teacher, layer, call, state) for call, state in zip(theirs, targets, strict=True)]
            lesson = teach_layer_(
                student, teacher, anatomy, layer, active, theirs, targets.__getitem__, states.__getitem__, settings,
                seed, student_calls=ours, teacher_outputs=outputs.__getitem__,
            )  # fmt: skip
            if lesson is not None:
                lessons.append(lesson)
            states = [run_layer(student, layer, call, state) for call, state in zip(ours, states, strict=True)]
            targets = outputs
            on_layer(layer.index + 1, len(anatomy.layers))
        return tuple(lessons)


def _check_width(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        if one.shape[-1] != other.shape[-1]:
            raise SettingError(
                f"Layers are taught one by one to give what the teacher's give; the student's hidden states have "
                f"{one.shape[-1]} channels, the teacher's {other.shape[-1]}. Teach the student as a whole: leave "
                "layerwise out of the recipe."
            )
