"""Station 3: the student's factors, layer by layer in forward order, for solvers that fit it to its own inputs.

    the teacher's layer, run on its own states -> what linears are to give -> group by group of linears that read the
    same input: the student's layer, as far as is needed -> moments -> factors -> the whole layer: the next one's states

The linears that add to the residual stream (o and down) are fitted to the teacher's *sum* rather than to their own
output: what earlier factors did to the stream is an error that they can still take back.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from makd.anatomy import Anatomy, Layer, Role, linear_shape
from makd.calibration import entries
from makd.calibration.held_out import SplitMoments
from makd.calibration.moments import CrossMoments, PairMoments, update_group
from makd.calibration.replay import NotLayerByLayer, run_layer, watch_layer
from makd.calibration.residual import Sum, find_sum
from makd.calibration.walk import Walk
from makd.errors import NumericsError
from makd.factorization.layers import LinearFit, keep_outputs, keep_sum, known_outputs, student_states
from makd.ranks.sharing import units_of
from makd.solvers.factors import Factors
from makd.solvers.regression import RIDGE, choose_ridge, fit_regression
from makd.student.linear import dense_weight
from makd.student.shared_linear import replace_linears_, stacked_linear

GROUPS = (
    (Role.QUERY_LATENT, Role.KEY_VALUE_LATENT),
    (Role.QUERY, Role.KEY, Role.VALUE),
    (Role.OUTPUT,),
    (Role.GATE, Role.UP),
    (Role.DOWN,),
)
"""Roles that read the same input, in forward order."""
TEXT_DEPTH_GAIN, TOKEN_DEPTH_GAIN = 4.0, 1.0
"""What an error in the last layer counts, relative to one in the first, for models whose outputs belong to whole texts
and to tokens. Later layers, fitted after it, take back part of an early error. all-MiniLM-L6-v2 at half of its linears,
400 texts, rank correlation and cosine to the teacher on unseen text: gain 0.25: 0.920 and 0.870; 1: 0.932 and 0.906; 4:
0.945 and 0.944; 14: 0.938 and 0.946; 50: 0.931 and 0.943. SmolLM2-135M at 0.8, perplexity on two texts: 1: 49.7 and
29.3; 4: 63.2 and 47.3. (python benchmarks/depth_gain.py minilm)"""
HELD_OUT_EVERY = 4
"""Of so many batches one is kept from the fit, to choose the ridge by; then all are fitted."""

Gram = Tensor | Sequence[Tensor] | None
"""Moments of output gradients; one matrix for each linear, where several are fitted as one."""
Unit = tuple[str, ...]
"""A linear, or several that share one A and are fitted as one."""


@dataclass(frozen=True)
class FitSettings:
    """What the student is to have."""

    ranks: Mapping[str, int | None]
    """Linear -> rank; None where it stays as it is."""
    shared: frozenset[Unit] = frozenset()
    """Linears of one layer that read the same input and get one A; `ranks` has the same for each."""
    gram: Callable[[str], Tensor] | None = None
    """Linear -> second moments of its output gradients, to weigh errors by; None weighs all alike."""


def depth_sensitivities(anatomy: Anatomy) -> dict[str, float]:
    """Linear -> what a unit of its energy is worth when layers are fitted in forward order; see `TEXT_DEPTH_GAIN`."""
    gain = TEXT_DEPTH_GAIN if anatomy.head is None else TOKEN_DEPTH_GAIN
    last = max(1, len(anatomy.layers) - 1)
    sensitivities: dict[str, float] = {}
    for layer in anatomy.layers:
        names = (*layer.linears, *(stack.name for stack in anatomy.stacks_of(layer)))
        sensitivities |= dict.fromkeys(names, gain ** (layer.index / last))
    return sensitivities


def fit_layer_(walk: Walk, student: nn.Module, settings: FitSettings, layer: Layer) -> dict[str, LinearFit]:
    """Replace the linears of a layer of `student` by factors fitted in forward order.

    Every linear is fitted to give what the teacher's gives, from the inputs that the student, factored up to there,
    has: its outputs or, where they are added to a residual stream, the stream after that.

    Args:
        walk: through the teacher, after `up`; hidden states that enter the student's layer are in its store.
        student: changed in place; in eval mode.
        settings: ranks and weights.
        layer: which one.

    Raises:
        NumericsError: activations hold NaN or infinity.
    """
    targets = _Targets.of(walk, layer, settings)
    fitted: dict[str, LinearFit] = {}
    for group in targets.groups:
        units = units_of(group, settings.shared)
        moments = _group_moments(walk, student, layer, group, units, targets)
        for unit in units:
            rank = settings.ranks[unit[0]]
            if rank is None:
                continue
            factors = fit_linear(_dense(walk.model, unit), moments.pop(unit), rank, _gram(settings, unit))
            replace_linears_(student, unit, factors)
            fitted |= dict.fromkeys(unit, LinearFit(factors.error, factors.fallback))
    walk.scratch.remove(entries.TARGETS)
    return fitted


def _gram(settings: FitSettings, unit: Unit) -> Gram:
    if settings.gram is None:
        return None
    return settings.gram(unit[0]) if len(unit) == 1 else _GramsOfUnit(settings.gram, unit)


class _GramsOfUnit(Sequence[Tensor]):
    """Moments of several linears, each read when it is asked for: together they may be more than there is room for."""

    def __init__(self, read: Callable[[str], Tensor], linears: Unit) -> None:
        self.read, self.linears = read, linears

    def __getitem__(self, place: Any) -> Any:
        return self.read(self.linears[place])

    def __len__(self) -> int:
        return len(self.linears)


def _dense(teacher: nn.Module, unit: Unit) -> nn.Module:
    """The teacher's linear, or several of them as one."""
    linears = [teacher.get_submodule(name) for name in unit]
    return linears[0] if len(unit) == 1 else stacked_linear(linears)


def fit_linear(linear: nn.Module, moments: SplitMoments, rank: int, gradient_gram: Gram) -> Factors:
    """Factors of one linear, with the ridge that did best on the tokens kept from it, fitted to all of them.

    Args:
        linear: the teacher's.
        moments: of the student's inputs and what the outputs should be, which are one afterwards; with no tokens held
            out, the ridge is `RIDGE`.
        rank: of the factors.
        gradient_gram: second moments of the output gradients, to weigh errors by.
    """
    weight, has_bias = dense_weight(linear), getattr(linear, "bias", None) is not None
    ridge = RIDGE
    if moments.held_out is not None and moments.held_out.rows:
        ridge = choose_ridge(weight, moments.to_fit, moments.held_out, fit_bias=has_bias, gradient_gram=gradient_gram)
    return fit_regression(weight, moments.together(), rank, fit_bias=has_bias, gradient_gram=gradient_gram, ridge=ridge)


@dataclass(frozen=True)
class _Targets:
    """What the linears of a layer are to give, of every batch in the walk's store; real tokens only, one a row.

    That is the sum which an output joins, where there is one; else the output itself or, where that is narrower, what
    the teacher's linear reads, from which the output follows.
    """

    groups: tuple[Unit, ...]
    """Linears that read the same tensor, in forward order."""
    sums: Mapping[str, Sum]
    """Linear -> where its output joins the residual stream."""
    by_input: frozenset[Unit]
    """Groups of which what they read is kept."""

    def unread(self, leaving: Iterable[str]) -> Unit:
        """Linears of which the input is kept, and whose outputs only linears read that are not looked at."""
        names: list[str] = []
        for group in reversed(self.groups):
            if group in self.by_input:
                names += group
            elif not set(group) <= set(leaving):
                break
        return tuple(names)

    @staticmethod
    def of(walk: Walk, layer: Layer, settings: FitSettings) -> "_Targets":
        """Run the teacher's layer with every batch."""
        sums = _find_sums(walk, layer)
        # a sum that leaves the layer is what enters the next: it is in the store
        leaving = {name for name, found in sums.items() if not found.module}
        names = set(layer.linears) - leaving
        readers = {found.module for found in sums.values() if found.module}
        found: _Targets | None = None

        def by_input(group: Unit) -> bool:
            # squares of outputs do not follow from inputs alone; without weights the error is told by them
            weighed = settings.gram is not None
            return weighed and not any(name in sums for name in group) and _is_narrower(walk.model, group)

        for index, calls in enumerate(walk.calls):
            hidden, silent = walk.states(layer.index, index), () if found is None else found.unread(leaving)
            seen = watch_layer(walk.model, layer, calls, hidden, names, readers, silent=silent)
            if found is None:
                groups = _find_groups(layer, seen.inputs, leaving)
                found = _Targets(groups, sums, frozenset(group for group in groups if by_input(group)))
            rows, kept = calls.real.flatten(), {}
            for group in found.groups:
                if group in found.by_input:
                    kept[group[0]] = seen.inputs[group[0]][rows]
                    continue
                for name in group:
                    if name not in leaving:
                        kept[name] = (seen.read_by[sums[name].module] if name in sums else seen.outputs[name])[rows]
            walk.scratch.write(entries.targets(index), kept)
        assert found is not None
        return found


def _find_sums(walk: Walk, layer: Layer) -> dict[str, Sum]:
    """Linear -> where its output joins the residual stream, for those where it does."""
    module, calls, hidden = walk.model.get_submodule(layer.module), walk.calls[0], walk.states(layer.index, 0)
    sums = {}
    for role in (Role.OUTPUT, Role.DOWN):
        if role in layer.roles:
            name = layer.roles[role].module
            linear = walk.model.get_submodule(name)
            found = find_sum(module, linear, lambda: run_layer(walk.model, layer, calls, hidden))
            if found is not None:
                sums[name] = found
    return sums


def _find_groups(layer: Layer, inputs: Mapping[str, Tensor], leaving: Iterable[str]) -> tuple[Unit, ...]:
    """Linears that read the same tensor, in forward order; those whose sum leaves the layer stand by themselves."""
    groups: list[list[str]] = []
    for together in GROUPS:
        names = dict.fromkeys(layer.roles[role].module for role in together if role in layer.roles)
        begun = len(groups)
        for name in names:
            apart = name in leaving
            group = next(
                (
                    group
                    for group in groups[begun:]
                    if not apart and group[0] in inputs and _same(inputs[group[0]], inputs[name])
                ),
                None,
            )
            if group is None:
                groups.append([name])
            else:
                group.append(name)
    return tuple(map(tuple, groups))


def _is_narrower(model: nn.Module, group: Unit) -> bool:
    shapes = [linear_shape(model.get_submodule(name)) for name in group]
    return shapes[0][1] < sum(out for out, _ in shapes)


def _group_moments(
    walk: Walk,
    student: nn.Module,
    layer: Layer,
    group: Unit,
    units: Sequence[Unit],
    targets: _Targets,
) -> dict[Unit, SplitMoments]:
    """Moments of what a group reads in the student with what its outputs should be: most batches', and the held-out.

    Where an output joins a sum, what it should be is the teacher's sum less the rest of the student's. What linears
    before these give is kept, so that they are not run again.
    """
    sizes = {name: linear_shape(walk.model.get_submodule(name)) for name in group}
    features, device = sizes[group[0]][1], walk.source.device
    by_input = group in targets.by_input
    pairs = [PairMoments(features, device) for _ in range(2)] if by_input else []
    outs = {unit: sum(sizes[name][0] for name in unit) for unit in units}
    cross = [] if by_input else [{u: CrossMoments(features, outs[u], device) for u in units} for _ in range(2)]
    readers = {targets.sums[name].module for name in group if name in targets.sums}
    place, is_last = targets.groups.index(group), group == targets.groups[-1]
    before = targets.groups[place - 1] if place and not is_last else ()  # what it gives is not read again at the last
    leaves = is_last and len(group) == 1 and group[0] in targets.sums and not targets.sums[group[0]].module
    for index, calls in enumerate(walk.calls):
        side = int((index + 1) % HELD_OUT_EVERY == 0)
        hidden = student_states(walk, layer.index, index)
        with _outputs_of(student, before) as outputs_before:
            # what these give themselves is no part of what they are fitted to
            known = known_outputs(walk, layer, index)
            seen = watch_layer(student, layer, calls, hidden, group, readers, known, silent=group)
        if outputs_before:
            keep_outputs(walk, before[0], index, outputs_before)
        if leaves:
            keep_sum(walk, group[0], index, seen.inputs[group[0]], seen.read_by[""])
        rows = calls.real.flatten()
        if not all(_same(seen.inputs[name], seen.inputs[group[0]]) for name in group):
            raise NotLayerByLayer(f"{', '.join(group)} read the same tensor in the teacher, and others in the student.")
        inputs, wanted = seen.inputs[group[0]][rows], walk.scratch.read(entries.targets(index), device)
        for name in (name for name in group if name in targets.sums):
            total = wanted[name] if name in wanted else walk.states(layer.index + 1, index).flatten(0, 1)[rows]
            wanted[name] = total - seen.read_by[targets.sums[name].module][rows]
        try:
            if by_input:
                pairs[side].update_pairs(inputs, wanted[group[0]])
            else:
                outputs = [torch.cat([wanted[name] for name in unit], dim=1) for unit in units]
                update_group([cross[side][unit] for unit in units], inputs, outputs)
        except NumericsError as error:
            raise NumericsError(
                f"The input of {group[0]} holds NaN or infinity during calibration. Use bfloat16 or float32 instead of "
                "float16, and check the teacher's outputs."
            ) from error
    if by_input:
        return {unit: SplitMoments(*(_of_outputs(walk, unit, side) for side in pairs)) for unit in units}
    return {unit: SplitMoments(cross[0][unit], cross[1][unit]) for unit in units}


@contextmanager
def _outputs_of(model: nn.Module, linears: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """What the first call of these gives inside the block."""
    outputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs.setdefault(name, output.clone())  # the model may change it afterwards

        return hook

    with ExitStack() as hooks:
        for name in linears:
            hooks.callback(model.get_submodule(name).register_forward_hook(note(name)).remove)
        yield outputs


def _of_outputs(walk: Walk, unit: Unit, pairs: PairMoments) -> CrossMoments:
    dense = _dense(walk.model, unit)
    return pairs.of_outputs(dense_weight(dense), getattr(dense, "bias", None))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
