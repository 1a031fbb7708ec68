"""Station 3: the walk's last way up: the student's layers, made in forward order from what the one before gives.

    a layer gets its factors -> perhaps learns to be what the teacher's is -> gives the states that enter the next

One layer of each side is in memory. Solvers that fit the student to its own inputs make their factors here; what others
have cut already is put in, where layers are to be taught.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Layer, resolve
from makd.calibration import entries
from makd.calibration.entries import OF_STUDENT_LAYER, of_batch
from makd.calibration.frame import Frame
from makd.calibration.replay import Calls, outputs_known, run_layer
from makd.calibration.source import LayerSource, ModelSource
from makd.calibration.walk import Batches, Walk


@dataclass(frozen=True)
class LinearFit:
    """How well a linear's factors fit it."""

    error: float
    """Predicted, relative to dropping the linear."""
    fallback: str | None = None


@dataclass(frozen=True)
class LayersReport:
    """Per-linear fit errors and per-layer training results of a student."""

    fitted: Mapping[str, LinearFit] = field(default_factory=dict)
    lessons: Mapping[int, Mapping[str, float | int]] = field(default_factory=dict)
    """Layer -> what teaching it did."""


MakeLayer = Callable[[Layer], Mapping[str, LinearFit]]
"""Puts factors into a layer of the student."""
TeachLayer = Callable[[Walk, PreTrainedModel, Layer], Mapping[str, float | int] | None]
"""Teaches a layer of the student, in place; tells what that did."""


def enter(student: PreTrainedModel, batches: Batches) -> list[Calls]:
    """What a student's layers are called with, and the hidden states that enter its first, of each batch."""
    frame = Frame(ModelSource(student), resolve(student))
    with frame.at_hand():
        return [frame.enter(batch) for batch in batches]


def begin_(walk: Walk, calls: Sequence[Calls] | None = None) -> None:
    """The hidden states that enter the student's first layer, into the walk's store: the teacher's, or its own.

    Args:
        walk: through the teacher.
        calls: of a student that has embeddings of its own: `enter`.
    """
    if walk.store.is_marked(entries.student_states(0)):
        return
    for index in range(len(walk.batches)):
        entering = walk.states(0, index) if calls is None else calls[index].entering
        walk.store.write(of_batch(entries.student_states(0), index), {"hidden": entering})
    walk.store.mark(entries.student_states(0))


@torch.no_grad()
def make_layers_(
    walk: Walk,
    student: LayerSource,
    make: MakeLayer,
    teach: TeachLayer | None = None,
    on_layer: Callable[[Layer], None] = lambda layer: None,
    calls: Sequence[Calls] | None = None,
) -> LayersReport:
    """Make every layer of `student`, a copy of the walk's model, in forward order.

    Args:
        walk: through the teacher, after `up`.
        student: changed in place; in eval mode. Hidden states that enter its first layer are in the store: `begin_`.
        make: puts factors into a layer, while its weights are there.
        teach: teaches the layer after that.
        on_layer: called with each layer when it is done.
        calls: what the student's layers are called with; None where that is what the teacher's are.

    Raises:
        NumericsError: activations hold NaN or infinity.
    """
    fitted: dict[str, LinearFit] = {}
    lessons: dict[int, Mapping[str, float | int]] = {}
    for layer in walk.anatomy.layers:
        here, there = entries.student_states(layer.index), entries.student_states(layer.index + 1)
        if not walk.store.is_marked(there):
            with walk.source.layer(layer), student.layer(layer):
                found = make(layer)
                lesson = None if teach is None else teach(walk, student.model, layer)
                if lesson is not None:
                    for entry in OF_STUDENT_LAYER:
                        walk.scratch.remove(entry)
                for index, call in enumerate(calls or walk.calls):
                    hidden = _leaving(walk, student.model, layer, call, index)
                    walk.store.write(of_batch(there, index), {"hidden": hidden})
            _keep_report(walk, layer, found, lesson)
            walk.store.mark(there)
            walk.store.remove(here)
            for entry in OF_STUDENT_LAYER:
                walk.scratch.remove(entry)
        notes = walk.store.notes(entries.layer_report(layer.index))
        fitted |= {name: LinearFit(*one) for name, one in json.loads(notes["fitted"]).items()}
        lessons |= {layer.index: json.loads(notes["lesson"])} if "lesson" in notes else {}
        on_layer(layer)
    return LayersReport(fitted, lessons)


def student_states(walk: Walk, layer: int, batch: int) -> Tensor:
    """Hidden states that enter a layer of the student, (batch, tokens, hidden)."""
    return walk.store.read(of_batch(entries.student_states(layer), batch), walk.source.device)["hidden"]


def keep_outputs(walk: Walk, first: str, batch: int, outputs: Mapping[str, Tensor]) -> None:
    """What linears of the layer at hand, of which `first` is the first, give in the student: they are not run again."""
    walk.scratch.write(entries.known_outputs(batch, first), outputs)


def known_outputs(walk: Walk, layer: Layer, batch: int) -> dict[str, Tensor]:
    """What was kept of the linears of a layer."""
    known: dict[str, Tensor] = {}
    for linear in layer.linears:
        entry = entries.known_outputs(batch, linear)
        if entry in walk.scratch:
            known |= walk.scratch.read(entry, walk.source.device)
    return known


def keep_sum(walk: Walk, linear: str, batch: int, inputs: Tensor, rest: Tensor) -> None:
    """What the last linear of a layer reads, and what its output is added to before it leaves the layer."""
    walk.scratch.write(entries.last_sum(batch), {"inputs": inputs, "rest": rest}, {"linear": linear})


def _leaving(walk: Walk, student: PreTrainedModel, layer: Layer, call: Calls, batch: int) -> Tensor:
    """The hidden states that leave a layer of the student: by its last linear alone, where the rest is known."""
    entering, entry = student_states(walk, layer.index, batch), entries.last_sum(batch)
    if entry not in walk.scratch:
        with outputs_known(student, known_outputs(walk, layer, batch)):
            return run_layer(student, layer, call, entering)
    found, linear = walk.scratch.read(entry, walk.source.device), walk.scratch.notes(entry)["linear"]
    added: Tensor = student.get_submodule(linear)(found["inputs"])
    return found["rest"].reshape(entering.shape) + added.reshape(entering.shape)


def _keep_report(
    walk: Walk, layer: Layer, fitted: Mapping[str, LinearFit], lesson: Mapping[str, float | int] | None
) -> None:
    notes = {"fitted": json.dumps({name: [one.error, one.fallback] for name, one in fitted.items()})}
    if lesson is not None:
        notes["lesson"] = json.dumps(dict(lesson))
    walk.store.write(entries.layer_report(layer.index), {"made": torch.ones(1)}, notes)
