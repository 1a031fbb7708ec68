"""Station 3: calibration layer by layer, in forward order, for solvers that fit the student to its own inputs.

Each layer of the teacher is computed once; each layer of the student about twice and a half: up to each group of
linears that read the same input (stopping there), and once whole, with its factors in place, to give the next layer its
input. What a layer gets besides hidden states (masks, positions) is noted in one forward of the teacher.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Layer, Role, linear_shape
from makd.anatomy.tokens import layer_tokens
from makd.errors import DataError, NumericsError, SettingError
from makd.lowrank.factors import Factors
from makd.lowrank.linear import LowRankLinear, dense_weight
from makd.lowrank.moments import CrossMoments
from makd.lowrank.solvers.regression import fit_regression

GROUPS = ((Role.QUERY, Role.KEY, Role.VALUE), (Role.OUTPUT,), (Role.GATE, Role.UP), (Role.DOWN,))
"""Roles that read the same input, in forward order."""


@dataclass
class _Calls:
    """What every layer was called with, for one batch."""

    real: Tensor
    """Real tokens, (batch, tokens)."""
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    """Layer -> arguments besides the hidden states."""
    teacher: Tensor
    """Hidden states that enter the layer in the teacher."""
    student: Tensor
    """The same in the student."""


class _Stop(Exception):
    """The forward has gone far enough."""


@torch.no_grad()
def fit_layers_(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    ranks: Mapping[str, int | None],
    batches: Iterable[Mapping[str, Tensor]],
    gradient_grams: Mapping[str, Tensor],
    on_layer: Callable[[int], None] = lambda done: None,
) -> dict[str, Factors]:
    """Replace the linears of `student`, a copy of `teacher`, by factors fitted in forward order.

    Every linear is fitted to give the teacher's outputs from the inputs that the student, factored up to there, has.
    Linears whose rank is None stay as they are.

    Args:
        student: changed in place.
        teacher: the same architecture, dense.
        anatomy: of both.
        ranks: linear -> rank.
        batches: calibration, seen once.
        gradient_grams: linear -> second moments of its output gradients, to weigh errors by; may be empty.
        on_layer: called with the number of layers that are done.

    Returns:
        The factors of each replaced linear.

    Raises:
        SettingError: the model shares layers or has two stacks, where layers cannot be computed one by one.
        DataError: there are no batches.
        NumericsError: activations hold NaN or infinity.
    """
    if anatomy.is_encoder_decoder or any(layer.call > 0 for layer in anatomy.layers):
        raise SettingError(
            "The regression solver fits layer after layer, which needs one stack of layers of their own; this model "
            "has two stacks or shared layers. Take the solver 'whitened'."
        )
    was_training = teacher.training
    teacher.eval()  # dropout would be in the targets
    try:
        return _fit_layers_(student, teacher, anatomy, ranks, batches, gradient_grams, on_layer)
    finally:
        teacher.train(was_training)


def _fit_layers_(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    ranks: Mapping[str, int | None],
    batches: Iterable[Mapping[str, Tensor]],
    gradient_grams: Mapping[str, Tensor],
    on_layer: Callable[[int], None],
) -> dict[str, Factors]:
    calls = [_note_calls(teacher, anatomy, batch) for batch in batches]
    if not calls:
        raise DataError("Calibration needs at least one batch; it got none. Is the data empty?")
    fitted: dict[str, Factors] = {}
    for layer in anatomy.layers:
        targets = [_teacher_outputs_(teacher, layer, call) for call in calls]
        for group in GROUPS:
            names = list(dict.fromkeys(layer.roles[role].module for role in group if role in layer.roles))
            moments = _group_moments(student, teacher, layer, names, calls, targets)
            for name in names:
                rank = ranks[name]
                if rank is None:
                    continue
                linear = teacher.get_submodule(name)
                has_bias = getattr(linear, "bias", None) is not None
                gram = gradient_grams.get(name)
                factors = fit_regression(
                    dense_weight(linear), moments[name], rank, fit_bias=has_bias, gradient_gram=gram
                )
                student.set_submodule(name, LowRankLinear.from_factors(factors, None).eval())
                fitted[name] = factors
        for call in calls:
            call.student = _forward(student, layer, call, call.student)
        on_layer(layer.index + 1)
    return fitted


def _note_calls(teacher: PreTrainedModel, anatomy: Anatomy, batch: Mapping[str, Tensor]) -> _Calls:
    """One forward of the teacher, to see what its layers are called with."""
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    entering: dict[int, Tensor] = {}

    def note(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest, named = (args[0], args[1:], kwargs) if args else (kwargs["hidden_states"], (), dict(kwargs))
            entering.setdefault(0, hidden)
            arguments[index] = (rest, {key: value for key, value in named.items() if key != "hidden_states"})

        return hook

    inputs = {key: value.to(teacher.device) for key, value in batch.items() if key != "labels"}
    with ExitStack() as hooks:
        if getattr(teacher.config, "use_cache", False):  # a cache would grow with every replay
            teacher.config.use_cache = False
            hooks.callback(setattr, teacher.config, "use_cache", True)
        for layer in anatomy.layers:
            module = teacher.get_submodule(layer.module)
            hooks.callback(module.register_forward_pre_hook(note(layer.index), with_kwargs=True).remove)
        teacher(**inputs)
    real = layer_tokens(anatomy, anatomy.layers[0], inputs)
    return _Calls(real, arguments, entering[0], entering[0])


def _forward(model: nn.Module, layer: Layer, call: _Calls, hidden: Tensor) -> Tensor:
    """The layer's output hidden states."""
    rest, named = call.arguments[layer.index]
    output = model.get_submodule(layer.module)(hidden, *rest, **named)
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


def _teacher_outputs_(teacher: nn.Module, layer: Layer, call: _Calls) -> dict[str, Tensor]:
    """Outputs of the layer's linears for real tokens, one a row; the call moves on to the next layer."""
    outputs: dict[str, Tensor] = {}
    rows = call.real.flatten()

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[name] = output.reshape(len(rows), -1)[rows]

        return hook

    with ExitStack() as hooks:
        for name in dict.fromkeys(linear.module for linear in layer.roles.values()):
            hooks.callback(teacher.get_submodule(name).register_forward_hook(keep(name)).remove)
        call.teacher = _forward(teacher, layer, call, call.teacher)
    return outputs


def _group_moments(
    student: nn.Module,
    teacher: nn.Module,
    layer: Layer,
    names: list[str],
    calls: list[_Calls],
    targets: list[dict[str, Tensor]],
) -> dict[str, CrossMoments]:
    """Moments of the group's input in the student with the teacher's outputs."""
    if not names:
        return {}
    found: dict[str, Tensor] = {}

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        found["input"] = args[0]
        raise _Stop

    sizes = {name: linear_shape(teacher.get_submodule(name)) for name in names}
    moments = {
        name: CrossMoments(in_features, out_features, calls[0].student.device)
        for name, (out_features, in_features) in sizes.items()
    }
    for call, wanted in zip(calls, targets, strict=True):
        with student.get_submodule(names[0]).register_forward_pre_hook(stop), suppress(_Stop):
            _forward(student, layer, call, call.student)
        rows = found["input"].reshape(call.real.numel(), -1)[call.real.flatten()]
        for name in names:
            try:
                moments[name].update_pairs(rows, wanted[name])
            except NumericsError as error:
                raise NumericsError(
                    f"The input of {name} holds NaN or infinity during calibration. Use bfloat16 or float32 instead of "
                    "float16, and check the teacher's outputs."
                ) from error
    return moments
