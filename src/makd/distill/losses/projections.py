"""Station 7: what a pair of models of different sizes needs: checks, and learned maps to the teacher's width.

A student of `makd.factorize` has the teacher's sizes, and needs none of this.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, linear_shape
from makd.anatomy.sizes import head_count, hidden_width
from makd.aspects import ActivePlan
from makd.capture import Tap
from makd.errors import SettingError

PROJECTIONS = "makd_projections"
"""What they are called as a part of the student, while they learn with it."""


class Projections(nn.Module):
    """Linear maps from the student's width to the teacher's, one for hidden states and one for each role's outputs.

    One map serves all layers. They are a part of the student while it is trained (`learned_with`), in its checkpoints
    too, and thrown away in the end. Source: TinyBERT (arXiv 1909.10351), whose W_h is shared by the layers too.
    """

    def __init__(self, widths: dict[str, tuple[int, int]], seed: int) -> None:
        """Random maps, the same for the same seed.

        Args:
            widths: what is mapped, as `name_of` calls it -> the student's width and the teacher's.
            seed: of the first values.
        """
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.maps = nn.ModuleDict(
                {name: nn.Linear(ours, theirs, bias=False) for name, (ours, theirs) in sorted(widths.items())}
            )

    def apply_to(self, tap: Tap, states: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens wide"]:
        """`states` of the student at a tap, in the teacher's width; as they are where the widths are the same."""
        name = name_of(tap)
        if name not in self.maps:
            return states
        projected: Tensor = self.maps[name](states)
        return projected


@contextmanager
def learned_with(student: nn.Module, projections: Projections | None) -> Iterator[None]:
    """Inside the block projections are a part of the student: optimized, shared among processes and kept with it."""
    if projections is None:
        yield
        return
    student.add_module(PROJECTIONS, projections)
    try:
        yield
    finally:
        delattr(student, PROJECTIONS)


def name_of(tap: Tap) -> str:
    """What a tap's projection is called: `hidden`, or its role."""
    return tap.kind if tap.role is None else tap.role.value


def make_projections(
    plan: ActivePlan,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    teacher_anatomy: Anatomy,
    seed: int,
) -> Projections | None:
    """The projections that `plan` needs; None where all widths are the same.

    Raises:
        SettingError: the sizes of the two models do not allow an aspect of the plan.
    """
    widths = find_widths(plan, student, teacher, anatomy, teacher_anatomy)
    return Projections(widths, seed) if widths else None


def find_widths(
    plan: ActivePlan, student: PreTrainedModel, teacher: PreTrainedModel, anatomy: Anatomy, teacher_anatomy: Anatomy
) -> dict[str, tuple[int, int]]:
    """What needs a projection by `plan`, as `name_of` calls it -> the student's width and the teacher's.

    Raises:
        SettingError: the sizes of the two models do not allow an aspect of the plan.
    """
    widths: dict[str, tuple[int, int]] = {}
    for active in plan.terms:
        if active.term.aspect == "embedding":
            _check_embedding(
                hidden_width(student, anatomy.layers[-1]), hidden_width(teacher, teacher_anatomy.layers[-1])
            )
        for comparison in active.comparisons:
            if comparison.measure == "attention":
                ours = head_count(student, anatomy.layers[comparison.tap.layer])
                theirs = head_count(teacher, teacher_anatomy.layers[comparison.teacher.layer])
                _check_heads(ours, theirs)
                continue
            ours = _width(comparison.tap, student, anatomy)
            theirs = _width(comparison.teacher, teacher, teacher_anatomy)
            if comparison.measure == "relation":
                _check_relation(comparison.heads, (ours, theirs), name_of(comparison.tap))
            elif ours != theirs:
                known = widths.setdefault(name_of(comparison.tap), (ours, theirs))
                if known != (ours, theirs):
                    raise SettingError(
                        f"The layers' {name_of(comparison.tap)!r} differ in width ({known} and {(ours, theirs)}), and "
                        "one projection serves them all. Choose layers of one width."
                    )
    return widths


def check_layer_map(student: Anatomy, teacher: Anatomy) -> None:
    """Refuse models that no layer map can bring together.

    Raises:
        SettingError: one is an encoder-decoder and the other is not, or both are and have other numbers of layers; or
            layers of the same place play other roles.
    """
    depths = len(student.layers), len(teacher.layers)
    if student.is_encoder_decoder != teacher.is_encoder_decoder or (
        student.is_encoder_decoder and [x.stack for x in student.layers] != [x.stack for x in teacher.layers]
    ):
        fits = False
    else:
        fits = depths[0] != depths[1] or all(
            ours.is_skipped or ours.roles.keys() == theirs.roles.keys()
            for ours, theirs in zip(student.layers, teacher.layers, strict=True)
        )
    if not fits:
        raise SettingError(
            f"Teacher ({teacher.family}, {depths[1]} layers) and student ({student.family}, {depths[0]} layers) do not "
            "line up. Make the student with makd.factorize or makd.baselines from this teacher."
        )


def _width(tap: Tap, model: PreTrainedModel, anatomy: Anatomy) -> int:
    layer = anatomy.layers[tap.layer]
    if tap.role is None:
        return hidden_width(model, layer)
    linear = layer.roles[tap.role]
    if linear.part is not None:
        return linear.part.features
    return linear_shape(model.get_submodule(linear.module))[0]


def _check_embedding(ours: int, theirs: int) -> None:
    if ours != theirs:
        raise SettingError(
            f"Embeddings of {ours} (student) and {theirs} (teacher) numbers have no cosine. "
            "Take the aspect 'similarity', which compares texts with each other, in a plan of one's own."
        )


def _check_heads(ours: int, theirs: int) -> None:
    if ours != theirs:
        raise SettingError(
            f"Attention is compared head by head, but the student has {ours} heads and the teacher {theirs}. "
            "Take the aspect 'relation', which has heads of its own."
        )


def _check_relation(heads: int, widths: tuple[int, int], role: str) -> None:
    if any(width % heads for width in widths):
        fits = max(number for number in range(1, heads + 1) if math.gcd(*widths) % number == 0)
        raise SettingError(
            f"{heads} relation_heads do not divide the widths of {role!r}: {widths[0]} (student) and {widths[1]} "
            f"(teacher). Give a common divisor, such as {fits}."
        )
