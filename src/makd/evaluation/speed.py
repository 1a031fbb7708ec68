"""Station 8: how fast a student is beside its teacher: factored, folded back to dense, and the best mixture of both."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.anatomy.limits import token_limit
from makd.anatomy.sizes import total_parameters
from makd.data import reads_blocks
from makd.errors import SettingError
from makd.evaluation.clock import Timing, take_turns, wait
from makd.evaluation.costs import stored_bytes
from makd.evaluation.decoding import DecodingTiming, random_ids, time_decoding
from makd.evaluation.pairing import check_own_teacher
from makd.kinds import checked
from makd.progress import OnProgress, Progress, nobody
from makd.registry import unknown_name
from makd.student.folding import added_parameters, factored_linears, fold_
from makd.student.linear import LowRankLinear

FOLD_FROM = 1.02
"""Factored / dense time from which linears are folded: of them alone, and then of the whole forward. Below, what is won
is less than what a timing is off by, and parameters are paid for it."""

FLOAT = "torch-float32"
"""The format that all others are compared with."""
FORMATS = (FLOAT, "torch-bfloat16", "torch-int8", "onnx-float32", "onnx-int8")
"""In which a model may be served. int8: of weights, with a scale for each output channel; what they are multiplied with
is rounded at run time. By torchao's `Int8DynamicActivationInt8WeightConfig`, by ONNX Runtime's dynamic quantization."""

FORWARDS_A_TURN = 5
"""Generation has as many times fewer turns than forwards have: a turn is one forward for each new token."""


@dataclass(frozen=True, kw_only=True)
@checked("bench")
class BenchConfig:
    """What is timed, and on what."""

    batches: tuple[int, ...] = (1, 16)
    """Rows of a forward."""
    lengths: tuple[int, ...] = (128,)
    """Tokens of a row, none of them padding. Every batch is timed at every length."""
    point: tuple[int, int] | None = None
    """Batch and length at which factored and dense linears are compared to decide which to fold; None takes the first
    of each."""
    new_tokens: int = 32
    """Tokens that a causal language model writes after each row of a batch, with its keys and values kept; 0 times no
    generation."""
    compile: bool = False
    """Whether `torch.compile`d forwards are timed too. What compiling takes is said apart."""
    repeats: int = 15
    """Turns that count; each model has one forward a turn."""
    threads: int | None = None
    """Threads of torch on a CPU; None leaves them as they are."""
    dtype: str = "float32"
    """dtype of both models: float32, bfloat16 or float16."""
    device: str = "cpu"
    """`cpu`, `cuda`, …; `auto` takes an accelerator if there is one."""
    formats: tuple[str, ...] = ()
    """In which numbers and runtimes both models are timed and measured besides, on the CPU: any of `FORMATS`."""

    def __post_init__(self) -> None:
        for name in ("batches", "lengths"):
            values = getattr(self, name)
            if not values or any(value < 1 for value in values):
                raise SettingError(f"{name} is one or more whole numbers, each at least 1; got {list(values)}.")
        if self.point is not None and min(self.point) < 1:
            raise SettingError(f"point is a batch and a length, each at least 1; got {list(self.point)}.")
        if self.new_tokens < 0:
            raise SettingError(f"new_tokens is at least 0; got {self.new_tokens}.")
        if self.repeats < 1:
            raise SettingError(f"repeats is at least 1; got {self.repeats}.")
        if self.threads is not None and self.threads < 1:
            raise SettingError(f"threads is at least 1; got {self.threads}.")
        for name in self.formats:
            if name not in FORMATS:
                raise unknown_name("format", name, FORMATS)
        if self.formats and (self.device, self.dtype) != ("cpu", "float32"):
            raise SettingError(
                f"formats are timed on the CPU, and have numbers of their own; got device {self.device} and dtype "
                f"{self.dtype}. Leave out both, or formats."
            )

    @property
    def points(self) -> list[tuple[int, int]]:
        """(batch, length) of every timing."""
        return [(batch, length) for length in self.lengths for batch in self.batches]

    def writes(self, model: PreTrainedModel) -> bool:
        """Whether generation of `model` is timed."""
        return self.new_tokens > 0 and reads_blocks(model)

    @property
    def fold_point(self) -> tuple[int, int]:
        """(batch, length) at which it is decided what to fold."""
        return self.point or (self.batches[0], self.lengths[0])


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """One of the models that take turns."""

    name: str
    """teacher, factored, folded or best."""
    parameters: int
    """Shared ones once."""
    bytes: int
    """Of its weights, in the dtype of the bench."""
    factored: int
    """How many of its linears are factors."""


@dataclass(frozen=True, kw_only=True)
class ForwardTiming:
    """One model's forward at one batch and length."""

    model: str
    batch: int
    length: int
    compiled: bool
    timing: Timing
    """Ratios are to the teacher's forward in eager mode."""
    compile_seconds: float | None = None
    """What the first forward took, compiling included."""


@dataclass(frozen=True, kw_only=True)
class LinearTiming:
    """Factored against dense, for linears of one shape and rank; those that share one A as one thing."""

    linears: tuple[str, ...]
    members: int
    """Linears that share one A, and are timed one after the other on one input; 1 has its own."""
    out_features: int
    """Of all members together."""
    in_features: int
    rank: int
    factored: Timing
    dense: Timing
    """Ratios are to dense."""

    @property
    def fold(self) -> bool:
        """Whether dense is faster, for these linears alone, by more than a timing is off by."""
        return self.factored.ratio >= FOLD_FROM


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured."""

    models: tuple[ModelSize, ...]
    forwards: tuple[ForwardTiming, ...]
    decoding: tuple[DecodingTiming, ...]
    """Of causal language models."""
    linears: tuple[LinearTiming, ...]
    fold: tuple[str, ...]
    """Linears that `best` has dense: factored is slower at the point that was chosen, and so is the whole forward; of
    those that share one A, all or none."""
    added_parameters: int
    """What folding them adds to the student."""


def measure_speed(
    student: PreTrainedModel, teacher: PreTrainedModel, settings: BenchConfig, on_progress: OnProgress | None = None
) -> Speed:
    """Time forwards of teacher, student, the student with every linear folded, and the best mixture; all take turns.

    Args:
        student: with factored linears, on the teacher's device and in its dtype.
        teacher: that it was made from.
        settings: what is timed. dtype and device are the models' own.
        on_progress: called with a `Progress` after each unit of work.

    Raises:
        SettingError: the student is not this teacher's, has no factored linears, or a length is beyond its positions;
            or there is no compiler.
    """
    progress = on_progress or nobody
    check_own_teacher(student, teacher)
    check_lengths(settings, student, teacher)
    if settings.compile:
        _check_compiler(student.device)
    with with_threads(settings.threads), in_eval(student, teacher):
        folded = _sharing_copy(student)
        fold_(folded)
        linears = _time_linears(student, folded, settings, progress)
        fold = tuple(name for row in linears if row.fold for name in row.linears)
        best = _sharing_copy(student)
        fold_(best, fold)
        if fold and not _is_faster(best, student, settings):
            fold, best = (), _sharing_copy(student)
        models = {"teacher": teacher, "factored": student, "folded": folded, "best": best}
        with without_cache(*models.values()):
            forwards = _time_forwards(models, settings, progress)
        decoding: tuple[DecodingTiming, ...] = ()
        if settings.writes(teacher):
            decoding = time_decoding(
                models, settings.points, settings.new_tokens, max(1, settings.repeats // FORWARDS_A_TURN), progress
            )
    return Speed(
        models=tuple(_size(name, model) for name, model in models.items()),
        forwards=forwards,
        decoding=decoding,
        linears=linears,
        fold=fold,
        added_parameters=added_parameters(student, fold),
    )


def check_lengths(settings: BenchConfig, *models: PreTrainedModel) -> None:
    """Refuse lengths beyond the positions of a model.

    Raises:
        SettingError: which, and what is allowed.
    """
    for model in models:
        limit = token_limit(model)
        new = settings.new_tokens if settings.writes(model) else 0
        if new and limit is not None and max(settings.lengths) <= limit < max(settings.lengths) + new:
            raise SettingError(
                f"{max(settings.lengths)} tokens and {new} new ones after them are beyond the positions of "
                f"{type(model).__name__}, which has {limit}. Lower new_tokens, or give shorter lengths."
            )
        longest = max(*settings.lengths, settings.fold_point[1])
        if limit is not None and longest > limit:
            raise SettingError(
                f"A length of {longest} tokens is beyond the positions of {type(model).__name__}, which has {limit}. "
                f"Give lengths up to {limit}."
            )


def _check_compiler(device: torch.device) -> None:
    """Refuse to measure compiled forwards where something small does not compile.

    Raises:
        SettingError: it does not work here.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:
        torch._dynamo.reset()
        raise SettingError(
            f"torch.compile does not work here: {' '.join(str(error).split())[:300]} It needs a C++ compiler for the "
            "CPU (CXX names it) and Triton for a GPU. Install one, or leave out --compile."
        ) from error


@contextmanager
def with_threads(number: int | None) -> Iterator[None]:
    """Inside, torch has so many threads on a CPU; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose modules can be replaced; the weights are the same tensors."""
    tensors = (*model.parameters(), *model.buffers())
    shared: PreTrainedModel = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    return shared


def _size(name: str, model: PreTrainedModel) -> ModelSize:
    return ModelSize(
        name=name,
        parameters=total_parameters(model),
        bytes=stored_bytes(model),
        factored=len(factored_linears(model)),
    )


def _is_faster(mixture: PreTrainedModel, student: PreTrainedModel, settings: BenchConfig) -> bool:
    """Whether whole forwards of `mixture` are faster: what linears win alone, others may lose to what they share."""
    inputs = random_inputs([mixture, student], *settings.fold_point)
    with without_cache(mixture, student):
        calls = {"mixture": partial(mixture, **inputs), "student": partial(student, **inputs)}
        return take_turns(calls, settings.repeats, student.device)["student"].ratio >= FOLD_FROM


def _sharing_one_a(student: PreTrainedModel) -> list[dict[str, LowRankLinear]]:
    """The factored linears of `student` by name, those together that share one A."""
    groups: dict[nn.Module, dict[str, LowRankLinear]] = {}
    for name in factored_linears(student):
        layer = student.get_submodule(name)
        assert isinstance(layer, LowRankLinear)
        groups.setdefault(layer.reduce, {})[name] = layer
    return list(groups.values())


def _time_linears(
    student: PreTrainedModel, folded: PreTrainedModel, settings: BenchConfig, progress: OnProgress
) -> tuple[LinearTiming, ...]:
    """Every factored linear, or group that shares one A, against itself folded; those of one shape are timed once."""
    alike: dict[tuple[tuple[int, int, int, bool], ...], list[tuple[str, ...]]] = {}
    for group in _sharing_one_a(student):
        shape = tuple((one.out_features, one.in_features, one.rank, one.bias is not None) for one in group.values())
        alike.setdefault(shape, []).append(tuple(group))
    rows = []
    batch, length = settings.fold_point
    for done, (shape, groups) in enumerate(alike.items(), start=1):
        _, in_features, rank, _ = shape[0]
        inputs = torch.randn(
            batch, length, in_features, generator=torch.Generator().manual_seed(0), device="cpu", dtype=torch.float32
        )
        inputs = inputs.to(student.device, student.dtype)
        pair = {
            side: partial(_call_all, [model.get_submodule(name) for name in groups[0]], inputs)
            for side, model in (("dense", folded), ("factored", student))
        }
        # as many calls as a second of work or so: a linear is short, and so is what disturbs it
        found = take_turns(pair, 4 * settings.repeats, student.device)
        rows.append(
            LinearTiming(
                linears=tuple(name for group in groups for name in group),
                members=len(shape),
                out_features=sum(member[0] for member in shape),
                in_features=in_features,
                rank=rank,
                **found,
            )
        )
        progress(Progress("time linears", done, len(alike), "shapes"))
    return tuple(rows)


def _call_all(layers: Sequence[nn.Module], inputs: Tensor) -> None:
    for layer in layers:
        layer(inputs)


def _time_forwards(
    models: Mapping[str, PreTrainedModel], settings: BenchConfig, progress: OnProgress
) -> tuple[ForwardTiming, ...]:
    points = settings.points
    rows: list[ForwardTiming] = []
    for done, (batch, length) in enumerate(points, start=1):
        inputs = random_inputs(list(models.values()), batch, length)
        calls: dict[str, Callable[[], Any]] = {name: partial(model, **inputs) for name, model in models.items()}
        seconds: dict[str, float] = {}
        if settings.compile:
            torch._dynamo.reset()  # or shapes add up until it gives up on compiling
            for name, model in models.items():
                calls[_compiled(name)] = partial(torch.compile(model, dynamic=False), **inputs)
                seconds[_compiled(name)] = _first_call(calls[_compiled(name)], model.device)
        device = models["teacher"].device
        for name, timing in take_turns(calls, settings.repeats, device).items():
            row = ForwardTiming(model=name, batch=batch, length=length, compiled=False, timing=timing)
            if name in seconds:
                bare = name.removesuffix(_compiled(""))
                row = replace(row, model=bare, compiled=True, compile_seconds=seconds[name])
            rows.append(row)
        progress(Progress("time forwards", done, len(points), "shapes"))
    if settings.compile:
        torch._dynamo.reset()
    return tuple(rows)


def _compiled(name: str) -> str:
    return f"{name}, compiled"


@torch.no_grad()
def _first_call(call: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def random_inputs(models: Sequence[PreTrainedModel], batch: int, length: int) -> dict[str, Tensor]:
    """Token ids that all `models` know, `length` in each of `batch` rows, without padding."""
    ids = random_ids(models, batch, length)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if models[0].config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs
