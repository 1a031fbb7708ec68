"""Station 3: calibration layer by layer, in forward order, for solvers that fit the student to its own inputs.

Each layer of the teacher is computed once; each layer of the student about three times: for each group of linears that
read the same input, as far as is needed, and once whole, with its factors in place, to give the next layer its input.

The linears that add to the residual stream (o and down) are fitted to the teacher's *sum* rather than to their own
output: what earlier factors did to the stream is an error that they can still take back.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, Layer, Role, linear_shape
from makd.calibration.moments import CrossMoments, update_group
from makd.calibration.replay import Calls, note_calls, run_layer, watch_layer
from makd.calibration.residual import Sum, find_sum
from makd.errors import DataError, NumericsError, SettingError
from makd.solvers.factors import Factors
from makd.solvers.regression import RIDGE, choose_ridge, fit_regression
from makd.student.embedding import LowRankEmbedding
from makd.student.linear import LowRankLinear, dense_weight
from makd.student.shared_linear import share_linears_, stacked_linear

GROUPS = ((Role.QUERY, Role.KEY, Role.VALUE), (Role.OUTPUT,), (Role.GATE, Role.UP), (Role.DOWN,))
"""Roles that read the same input, in forward order."""
TEXT_DEPTH_GAIN, TOKEN_DEPTH_GAIN = 4.0, 1.0
"""What an error in the last layer counts, relative to one in the first, for models whose outputs belong to whole texts
and to tokens. Later layers, fitted after it, take back part of an early error. all-MiniLM-L6-v2 at half of its linears,
400 texts, rank correlation and cosine to the teacher on unseen text: gain 0.25: 0.920 and 0.870; 1: 0.932 and 0.906; 4:
0.945 and 0.944; 14: 0.938 and 0.946; 50: 0.931 and 0.943. SmolLM2-135M at 0.8, perplexity on two texts: 1: 49.7 and
29.3; 4: 63.2 and 47.3. (python benchmarks/depth_gain.py)"""
HELD_OUT_EVERY = 4
"""Of so many batches one is kept from the fit, to choose the ridge by; then all are fitted."""


Gram = Tensor | Sequence[Tensor] | None
"""Moments of output gradients; one matrix for each linear, where several are fitted as one."""
Fit = Callable[[nn.Module, CrossMoments, CrossMoments, int, Gram], Factors]
"""The teacher's linear, moments to fit, held-out moments, rank, output-gradient moments -> factors."""


def depth_sensitivities(anatomy: Anatomy) -> dict[str, float]:
    """Linear -> what a unit of its energy is worth when layers are fitted in forward order; see `TEXT_DEPTH_GAIN`."""
    gain = TEXT_DEPTH_GAIN if anatomy.head is None else TOKEN_DEPTH_GAIN
    last = max(1, len(anatomy.layers) - 1)
    return {linear.module: gain ** (layer.index / last) for layer in anatomy.layers for linear in layer.roles.values()}


@torch.no_grad()
def fit_layers_(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    anatomy: Anatomy,
    ranks: Mapping[str, int | None],
    batches: Iterable[Mapping[str, Tensor]],
    gradient_grams: Mapping[str, Tensor],
    on_layer: Callable[[int], None] = lambda done: None,
    *,
    fit: Fit | None = None,
    shared: Iterable[tuple[str, ...]] = (),
) -> dict[str, Factors]:
    """Replace the linears of `student`, a copy of `teacher`, by factors fitted in forward order.

    Every linear is fitted to give what the teacher's gives, from the inputs that the student, factored up to there,
    has: its outputs or, where they are added to a residual stream, the stream after that. Linears whose rank is None
    stay as they are.

    Args:
        student: changed in place.
        teacher: the same architecture, dense.
        anatomy: of the student, which may have dropped layers that the teacher has.
        ranks: linear -> rank.
        batches: calibration, seen once.
        gradient_grams: linear -> second moments of its output gradients, to weigh errors by; may be empty.
        on_layer: called with the number of layers that are done.
        fit: makes the factors of one linear; by default `fit_linear`, regression with a chosen ridge.
        shared: linears of one layer that read the same input and get one A; `ranks` has the same for each. They are
            fitted as one linear, with their outputs one after the other.

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
        return _fit_layers_(
            student, teacher, anatomy, ranks, batches, gradient_grams, on_layer, fit or fit_linear, set(shared)
        )
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
    fit: Fit,
    shared: set[tuple[str, ...]],
) -> dict[str, Factors]:
    batches = list(batches)
    calls = [note_calls(teacher, anatomy, batch) for batch in batches]
    if not calls:
        raise DataError("Calibration needs at least one batch; it got none. Is the data empty?")
    if any(isinstance(module, LowRankEmbedding) for module in student.modules()):
        for call, batch in zip(calls, batches, strict=True):  # the student's layers begin with its own embeddings
            call.student = note_calls(student, anatomy, batch).student
    fitted: dict[str, Factors] = {}
    for layer in anatomy.layers:
        sums = _find_sums(teacher, layer, calls[0])
        targets = [_teacher_targets_(teacher, layer, call, sums) for call in calls]
        for group in GROUPS:
            names = tuple(dict.fromkeys(layer.roles[role].module for role in group if role in layer.roles))
            units = [names] if names in shared else [(name,) for name in names]
            moments = _group_moments(student, teacher, layer, units, calls, targets, sums)
            for unit, (fits, held_out) in moments.items():
                rank = ranks[unit[0]]
                if rank is not None:
                    gram = _grams(gradient_grams, unit)
                    fitted |= _put_(student, unit, fit(_dense(teacher, unit), fits, held_out, rank, gram))
        for call in calls:
            call.student = run_layer(student, layer, call, call.student)
        on_layer(layer.index + 1)
    return fitted


def _grams(gradient_grams: Mapping[str, Tensor], unit: tuple[str, ...]) -> Gram:
    if len(unit) == 1:
        return gradient_grams.get(unit[0])
    return [gradient_grams[name] for name in unit] if gradient_grams else None


def _dense(teacher: nn.Module, unit: tuple[str, ...]) -> nn.Module:
    """The teacher's linear, or several of them as one."""
    linears = [teacher.get_submodule(name) for name in unit]
    return linears[0] if len(unit) == 1 else stacked_linear(linears)


def _put_(student: PreTrainedModel, unit: tuple[str, ...], factors: Factors) -> dict[str, Factors]:
    """Factors in the place of one linear, or of several that share A; each linear's own."""
    if len(unit) > 1:
        return share_linears_(student, unit, factors)
    student.set_submodule(unit[0], LowRankLinear.from_factors(factors, None).eval())
    return {unit[0]: factors}


def fit_linear(
    linear: nn.Module, moments: CrossMoments, held_out: CrossMoments, rank: int, gradient_gram: Gram
) -> Factors:
    """Factors of one linear, with the ridge that did best on the tokens kept from it, fitted to all of them.

    Args:
        linear: the teacher's.
        moments: of the student's inputs and what the outputs should be; `held_out` is added to them.
        held_out: the same over other tokens; with none, the ridge is `RIDGE`.
        rank: of the factors.
        gradient_gram: second moments of the output gradients, to weigh errors by.
    """
    weight, has_bias = dense_weight(linear), getattr(linear, "bias", None) is not None
    ridge = RIDGE
    if held_out.rows:
        ridge = choose_ridge(weight, moments, held_out, fit_bias=has_bias, gradient_gram=gradient_gram)
        moments.merge(held_out)
    return fit_regression(weight, moments, rank, fit_bias=has_bias, gradient_gram=gradient_gram, ridge=ridge)


def _find_sums(teacher: nn.Module, layer: Layer, call: Calls) -> dict[str, Sum]:
    """Linear -> where its output joins the residual stream, for those where it does."""
    module = teacher.get_submodule(layer.module)
    sums = {}
    for role in (Role.OUTPUT, Role.DOWN):
        if role in layer.roles:
            name = layer.roles[role].module
            found = find_sum(module, teacher.get_submodule(name), lambda: run_layer(teacher, layer, call, call.teacher))
            if found is not None:
                sums[name] = found
    return sums


def _teacher_targets_(teacher: nn.Module, layer: Layer, call: Calls, sums: Mapping[str, Sum]) -> dict[str, Tensor]:
    """What the student's linears are to give, real tokens only, one a row; the call moves on to the next layer.

    That is the sum which their output joins, where there is one, else that output.
    """
    names = {linear.module for linear in layer.roles.values()}
    seen = watch_layer(teacher, layer, call, call.teacher, names, {"", *(found.module for found in sums.values())})
    call.teacher = seen.read_by[""].reshape(call.teacher.shape)
    rows = call.real.flatten()
    return {name: (seen.read_by[sums[name].module] if name in sums else seen.outputs[name])[rows] for name in names}


def _group_moments(
    student: nn.Module,
    teacher: nn.Module,
    layer: Layer,
    units: Sequence[tuple[str, ...]],
    calls: list[Calls],
    targets: list[dict[str, Tensor]],
    sums: Mapping[str, Sum],
) -> dict[tuple[str, ...], tuple[CrossMoments, CrossMoments]]:
    """Moments of the group's input in the student with what its outputs should be: most batches', and the held-out.

    A unit is one linear, or several that are fitted as one. Where an output joins a sum, what it should be is the
    teacher's sum less the rest of the student's.
    """
    names = [name for unit in units for name in unit]
    if not names:
        return {}
    sizes = {name: linear_shape(teacher.get_submodule(name)) for name in names}
    fits, held_out = (
        [
            CrossMoments(sizes[unit[0]][1], sum(sizes[name][0] for name in unit), calls[0].student.device)
            for unit in units
        ]
        for _ in range(2)
    )
    readers = {sums[name].module for name in names if name in sums}
    for number, (call, wanted) in enumerate(zip(calls, targets, strict=True), start=1):
        moments = held_out if number % HELD_OUT_EVERY == 0 else fits
        seen, rows = watch_layer(student, layer, call, call.student, names, readers), call.real.flatten()
        outputs = []
        for unit in units:
            parts = []
            for name in unit:
                target = wanted[name]
                if name in sums:
                    target = target - (seen.read_by[sums[name].module] - seen.outputs[name])[rows]
                parts.append(target)
            outputs.append(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        try:
            if all(_same(seen.inputs[name], seen.inputs[names[0]]) for name in names):
                update_group(moments, seen.inputs[names[0]][rows], outputs)
            else:
                for unit, one, output in zip(units, moments, outputs, strict=True):
                    one.update_pairs(seen.inputs[unit[0]][rows], output)
        except NumericsError as error:
            raise NumericsError(
                f"The input of {names[0]} holds NaN or infinity during calibration. Use bfloat16 or float32 instead of "
                "float16, and check the teacher's outputs."
            ) from error
    return dict(zip(units, zip(fits, held_out, strict=True), strict=True))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
