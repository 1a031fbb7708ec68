"""Station 8: whether a student is this teacher's."""

from transformers import PreTrainedModel

from makd.anatomy import Predictions, check_predictions, linear_shape, predictions_of, resolve
from makd.errors import SettingError
from makd.student.folding import factored_linears


def common_predictions(student: PreTrainedModel, teacher: PreTrainedModel) -> Predictions | None:
    """What both predict; None if both end in hidden states.

    Raises:
        SettingError: they do not predict the same.
        UnsupportedModelError: nobody knows what one of them predicts.
    """
    ours, theirs = predictions_of(student), predictions_of(teacher)
    for model in (student, teacher):
        check_predictions(model)
    reason = "the student has no head" if ours is None and theirs is not None else ours and ours.why_not(theirs)
    if reason:
        raise SettingError(
            f"Student and teacher cannot be compared: {reason}. Give the student's own teacher, under the same head "
            "(the setting `head`)."
        )
    return ours


def check_own_teacher(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse models that are not a factored student and the teacher that it was made from.

    Layers are compared by the roles and shapes of their linears; layers that the student does without line up with
    any. Both have the same head: a forward with one and a forward without are no two sides of a comparison.

    Raises:
        SettingError: they do not line up, predict something else, or there is nothing factored in the student.
        UnsupportedModelError: the linears of one of them cannot be told apart, or nobody knows what it predicts.
    """
    if not factored_linears(student):
        raise SettingError(
            f"The student ({type(student).__name__}) has no factored linears, so there is nothing to compare or fold. "
            "Give the folder of a student that `makd compress` or `makd factorize` wrote; the teacher goes to "
            "--teacher."
        )
    if factored_linears(teacher):
        raise SettingError("The teacher has factored linears. Give the dense model that the student was made from.")
    ours, theirs = resolve(student).layers, resolve(teacher).layers
    if len(ours) != len(theirs):
        raise SettingError(
            f"This is another teacher's student: it has {len(ours)} layers and the teacher {len(theirs)}. Give the "
            "model that the student was made from (`teacher` in its recipe.yaml)."
        )
    for mine, other in zip(ours, theirs, strict=True):
        if mine.is_skipped:
            continue
        shapes = [
            {role.value: linear_shape(model.get_submodule(linear.module)) for role, linear in layer.roles.items()}
            for model, layer in ((student, mine), (teacher, other))
        ]
        if shapes[0] != shapes[1]:
            role = next(role for role in {**shapes[0], **shapes[1]} if shapes[0].get(role) != shapes[1].get(role))
            sizes = " and ".join(
                f"{side} has {'none' if role not in found else ' x '.join(map(str, found[role]))}"
                for side, found in zip(("the student", "the teacher"), shapes, strict=True)
            )
            raise SettingError(
                f"This is another teacher's student: of {role!r} in layer {mine.index}, {sizes}. Give the model that "
                "the student was made from (`teacher` in its recipe.yaml)."
            )
    common_predictions(student, teacher)
