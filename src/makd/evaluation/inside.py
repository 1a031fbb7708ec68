"""Station 8: where inside a student its error is: at each layer and each linear, beside the teacher.

One forward each of a few held-out rows at a time, so that what is recorded of the teacher stays small. Nothing random
happens: a run that looks inside makes the same student as one that does not.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import Anatomy, resolve
from makd.anatomy.batches import model_inputs
from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.anatomy.tokens import by_token
from makd.aspects import cosine_distance, variance_sums, variance_unit
from makd.capture import AttentionCall, Recording, Tap, capture, examine
from makd.devices import widest_dtype
from makd.distill.losses.counted import TokenMasks
from makd.distill.losses.layers import compare_calls

TOKENS = 1024
"""That are looked at, about: seconds on a CPU for a model of 100 M parameters."""
LONGEST = 256
"""Tokens of a forward: a few rows, or the beginning of one."""
_ASPECTS = {"hidden": "hidden", "linear": "matrix", "attention": "attention", "cross_attention": "attention"}
"""Kind of a tap -> the aspect that compares what is there."""


@dataclass(frozen=True)
class LayerErrors:
    """How far each layer and linear of a student is from the teacher's.

    Errors are relative: see `makd.aspects.hidden.normalised_mse`; 1 is a constant's.
    """

    rows: int
    tokens: int
    """Real ones."""
    layers: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    """Layer -> `hidden_error`, `hidden_cosine`, and `attention_kl` and `cross_attention_kl` in nats."""
    linears: Mapping[str, float] = field(default_factory=dict)
    """Linear -> relative error of its output, from the inputs that it has in the student."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Aspect that could not be looked at -> why."""


@dataclass
class _Sums:
    """Over all tokens so far."""

    difference: float = 0.0
    count: Tensor | int = 0
    squares: Tensor | float = 0.0
    channels: Tensor | float = 0.0

    def add(self, ours: Tensor, theirs: Tensor, real: Tensor) -> None:
        dtype = widest_dtype(theirs.device)
        wide = theirs.to(dtype)
        self.difference += float((ours.to(dtype) - wide).masked_fill(~real.unsqueeze(-1), 0).square().sum())
        count, squares, channels = variance_sums(wide, real)
        self.count, self.squares, self.channels = self.count + count, self.squares + squares, self.channels + channels

    @property
    def parts(self) -> tuple[float, float]:
        """Mean squared difference, and its unit, both times tokens and channels."""
        assert isinstance(self.count, Tensor)
        assert isinstance(self.squares, Tensor)
        assert isinstance(self.channels, Tensor)
        unit = variance_unit(self.count, self.squares, self.channels)
        return self.difference, float(unit) * int(self.count) * len(self.channels)


@torch.no_grad()
def look_inside(
    student: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]
) -> LayerErrors:
    """Compare both models layer by layer, and linear by linear, on some rows of `batches`.

    Args:
        student: the model that is measured.
        teacher: the model that it mimics. Where it has other widths, heads or layers, `LayerErrors.missing` says so.
        batches: held-out model inputs; rows are taken from all over them.

    Raises:
        UnsupportedModelError: what a layer gives is laid out in a way that nobody knows.
    """
    ours, theirs = resolve(student), examine(teacher)
    if len(ours.layers) != len(theirs.layers):
        why = f"the student has {len(ours.layers)} layers and the teacher {len(theirs.layers)}: none is another's"
        return LayerErrors(0, 0, missing={"hidden": why, "matrix": why, "attention": why})
    taps = tuple(_taps(ours, theirs))
    states: dict[Tap, _Sums] = {}
    means: dict[tuple[int, str], list[tuple[float, int]]] = {}
    unlike: dict[str, dict[str, set[int]]] = {}
    rows = tokens = 0
    with in_eval(student, teacher), without_cache(student, teacher):
        for row in _choose_rows(batches):
            inputs = model_inputs(row, student.device)
            counted = TokenMasks(ours, inputs)
            with capture(teacher, theirs, taps) as reference:
                teacher(**model_inputs(row, teacher.device))
            with capture(student, ours, taps) as recording:
                student(**inputs)
            for tap in taps:
                real, _ = counted.real(tap)
                if (sides := _sides(tap, recording, reference)) is None:
                    continue
                if (reason := _difference(tap, *sides)) is not None:
                    unlike.setdefault(_ASPECTS[tap.kind], {}).setdefault(reason, set()).add(tap.layer)
                    continue
                _compare(tap, *sides, real, states, means)
            rows, tokens = rows + len(row["input_ids"]), tokens + int(counted.real(Tap(0, "hidden"))[0].sum())
    layers: dict[int, dict[str, float]] = {}
    for (index, name), found in means.items():
        weights = sum(weight for _, weight in found)
        layers.setdefault(index, {})[name] = sum(value * weight for value, weight in found) / weights
    for tap, sums in states.items():
        if tap.kind == "hidden":
            difference, unit = sums.parts
            layers.setdefault(tap.layer, {})["hidden_error"] = difference / unit
    missing = {**theirs.off, **{aspect: _unlike(found) for aspect, found in unlike.items()}}
    return LayerErrors(rows, tokens, dict(sorted(layers.items())), _by_linear(ours, states), missing)


def _taps(ours: Anatomy, theirs: Anatomy) -> Iterator[Tap]:
    """What both have and can be compared."""
    for layer, other in zip(ours.layers, theirs.layers, strict=True):
        if layer.is_skipped:
            continue
        if "hidden" not in theirs.off:
            yield Tap(layer.index, "hidden")
        if "matrix" not in theirs.off:
            yield from (Tap(layer.index, "linear", role) for role in layer.roles if role in other.roles)
        if "attention" not in theirs.off:
            if layer.attention is not None and other.attention is not None:
                yield Tap(layer.index, "attention")
            if layer.cross_attention is not None and other.cross_attention is not None:
                yield Tap(layer.index, "cross_attention")


def _sides(tap: Tap, recording: Recording, reference: Recording) -> tuple[Any, Any] | None:
    """What student and teacher have at a tap; None where an architecture did not come by there."""
    ours, theirs = (side.attention.get(tap, side.tensors.get(tap)) for side in (recording, reference))
    return None if ours is None or theirs is None else (ours, theirs)


def _difference(tap: Tap, ours: Any, theirs: Any) -> str | None:
    """Why what both have at a tap cannot be compared, in words; None if it can."""
    if isinstance(ours, AttentionCall):
        heads = ours.query.shape[1], theirs.query.shape[1]
        return None if heads[0] == heads[1] else f"{heads[0]} heads beside the teacher's {heads[1]}"
    what = "the output" if tap.role is None else tap.role.value
    widths = ours.shape[-1], theirs.shape[-1]
    return None if widths[0] == widths[1] else f"{what} is {widths[0]} wide beside the teacher's {widths[1]}"


def _unlike(found: Mapping[str, set[int]]) -> str:
    """Differences, with the layers that have them, as one reason."""
    return "; ".join(
        f"{difference} in layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, sorted(layers)))}"
        for difference, layers in found.items()
    )


def _compare(
    tap: Tap,
    mine: Any,
    other: Any,
    real: Tensor,
    states: dict[Tap, _Sums],
    means: dict[tuple[int, str], list[tuple[float, int]]],
) -> None:
    """Add what student and teacher have at one tap in one row."""
    count = int(real.sum())
    if isinstance(mine, AttentionCall):
        kl = float(compare_calls(other, mine, real))
        means.setdefault((tap.layer, f"{tap.kind}_kl"), []).append((max(kl, 0.0), count))
        return
    pair = [by_token(side, real, f"What layer {tap.layer} gives") for side in (mine, other.to(mine.device))]
    states.setdefault(tap, _Sums()).add(pair[0], pair[1], real)
    if tap.kind == "hidden":
        cosine = 1 - float(cosine_distance(pair[0], pair[1], real))
        means.setdefault((tap.layer, "hidden_cosine"), []).append((cosine, count))


def _by_linear(anatomy: Anatomy, states: Mapping[Tap, _Sums]) -> dict[str, float]:
    """Errors of whole linears: a fused one has those of its roles together; one that several calls share, of all."""
    parts: dict[str, list[tuple[float, float]]] = {}
    for tap, sums in states.items():
        if tap.role is not None:
            parts.setdefault(anatomy.layers[tap.layer].roles[tap.role].module, []).append(sums.parts)
    return {name: sum(one for one, _ in found) / sum(unit for _, unit in found) for name, found in parts.items()}


def _choose_rows(batches: Sequence[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Rows from all over `batches`, a few that stood together at a time, up to `TOKENS` real tokens."""
    pieces = []
    for number, batch in enumerate(batches):
        rows, width = batch["input_ids"].shape
        size = max(1, LONGEST // max(1, width))
        pieces += [(number, slice(start, start + size)) for start in range(0, rows, size)]
    known = 0
    # multiples of the golden ratio: whichever of them are the first, they lie evenly
    for place in sorted(range(len(pieces)), key=lambda place: place * 0.6180339887 % 1):
        if known >= TOKENS:
            return
        few = _cut(batches[pieces[place][0]], pieces[place][1])
        known += int(few["attention_mask"].sum()) if "attention_mask" in few else few["input_ids"].numel()
        yield few


def _cut(batch: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Some rows of a batch; of rows that are longer than `LONGEST`, that many tokens from the first real one on."""
    shape, mask = batch["input_ids"].shape, batch.get("attention_mask")
    first = 0 if mask is None else int(mask[rows].any(0).int().argmax())
    stop = max(LONGEST, first + LONGEST) if shape[1] > LONGEST else shape[1]
    found = {}
    for name, value in batch.items():
        is_by_token = value.shape == shape and not name.startswith(("decoder_", "labels"))
        found[name] = value[rows, :stop] if is_by_token else value[rows]
    return found
