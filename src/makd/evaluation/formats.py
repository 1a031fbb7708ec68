"""Station 8: a model in the numbers and runtimes that it may be served in, each behind the forward of its class."""

import copy
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.errors import SettingError
from makd.evaluation.clock import Timing, take_turns
from makd.evaluation.costs import stored_bytes
from makd.evaluation.pairing import check_own_teacher
from makd.evaluation.speed import FLOAT, BenchConfig, check_lengths, random_inputs, with_threads
from makd.export import OnnxSession, save_onnx
from makd.export.onnx_model import run_by
from makd.export.tracing import check_packages
from makd.progress import OnProgress, Progress, nobody

PAUSE = 0.01
"""Seconds between forwards of different runtimes."""


@dataclass(frozen=True, kw_only=True)
class FormatTiming:
    """A forward at one batch and length."""

    batch: int
    length: int
    timing: Timing
    """Ratios are to the teacher's forward in `FLOAT`."""


@dataclass(frozen=True, kw_only=True)
class FormatRow:
    """One of the two models in one format."""

    model: str
    """teacher or student."""
    format: str
    """One of `makd.evaluation.speed.FORMATS`."""
    bytes: int
    """Of the file, or of the weights if they were saved as they are."""
    timings: tuple[FormatTiming, ...]
    scores: Mapping[str, Any]
    """What was measured of its outputs on data."""


def check_formats(formats: tuple[str, ...], teacher: PreTrainedModel) -> None:
    """Refuse early what cannot be run here.

    Raises:
        SettingError: a package is missing; or there is no ONNX file that one forward reads.
    """
    if any(name.startswith("onnx") for name in formats):
        check_packages("Timing ONNX files", ("onnx", "onnxscript", "onnxruntime"))
        if teacher.config.is_encoder_decoder:
            raise SettingError(
                f"A {type(teacher).__name__} becomes two ONNX files, encoder and decoder, whose forwards are not timed "
                "as one. Leave out the onnx formats."
            )
    if "torch-int8" in formats:
        check_packages("Timing torch-int8", ("torchao",), extra="quantize")


def measure_formats(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: BenchConfig,
    score: Callable[[PreTrainedModel], Mapping[str, Any]],
    on_progress: OnProgress | None = None,
) -> tuple[FormatRow, ...]:
    """Teacher and student in each format: bytes, latency, and what `score` finds of their outputs.

    Args:
        student: in float32, on the CPU.
        teacher: the same.
        tokenizer: says which inputs they are given.
        settings: formats, batches, lengths, turns and threads. All models take turns at each batch and length.
        score: what is measured of a model's outputs, on data.
        on_progress: called with a `Progress` after each unit of work.

    Raises:
        SettingError: a format cannot be run here, or a length is beyond the positions of a model.
        ExportError: a model cannot be written as ONNX.
    """
    progress = on_progress or nobody
    formats = tuple(dict.fromkeys((FLOAT, *settings.formats)))
    check_formats(formats, teacher)
    check_own_teacher(student, teacher)
    check_lengths(settings, student, teacher)
    pair = {"teacher": teacher, "student": student}
    with with_threads(settings.threads), in_eval(student, teacher), tempfile.TemporaryDirectory() as work:
        models, sizes = {}, {}
        for done, (who, name) in enumerate([(who, name) for name in formats for who in pair], start=1):
            folder = Path(work, f"{who}-{name}")
            folder.mkdir()
            models[who, name], sizes[who, name] = in_format(pair[who], name, folder, tokenizer)
            progress(Progress("convert", done, len(formats) * len(pair), "models"))
        timings = _time(models, settings, progress)
        rows = []
        for done, key in enumerate(models, start=1):
            scores = score(models[key])
            rows.append(
                FormatRow(model=key[0], format=key[1], bytes=sizes[key], timings=tuple(timings[key]), scores=scores)
            )
            progress(Progress("measure formats", done, len(models), "models"))
    return tuple(rows)


def in_format(
    model: PreTrainedModel, name: str, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, int]:
    """`model` in one of `FORMATS`, behind the same class, and its bytes.

    Args:
        model: in float32, on the CPU, in eval mode; it stays as it is.
        name: of the format.
        folder: for files.
        tokenizer: says which inputs it is given.
    """
    runtime, _, numbers = name.partition("-")
    if runtime == "onnx":
        save_onnx(model, folder, quantize="int8" if numbers == "int8" else "none", tokenizer=tokenizer)
        size = sum(path.stat().st_size for path in folder.iterdir())
        return run_by(model, OnnxSession(folder / "model.onnx")), size
    if numbers == "int8":
        return _int8(model, folder)
    found: PreTrainedModel = model if numbers == "float32" else copy.deepcopy(model).bfloat16()
    return found, stored_bytes(found)


def _int8(model: PreTrainedModel, folder: Path) -> tuple[PreTrainedModel, int]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    found = copy.deepcopy(model)
    quantize_(found, Int8DynamicActivationInt8WeightConfig())
    torch.save(found.state_dict(), folder / "weights.pt")
    return found, os.path.getsize(folder / "weights.pt")


def _time(
    models: Mapping[tuple[str, str], PreTrainedModel], settings: BenchConfig, progress: OnProgress
) -> dict[tuple[str, str], list[FormatTiming]]:
    found: dict[tuple[str, str], list[FormatTiming]] = {key: [] for key in models}
    names = {f"{who} {name}": (who, name) for who, name in models}
    cpu = torch.device("cpu")
    with without_cache(*models.values()):
        for done, (batch, length) in enumerate(settings.points, start=1):
            inputs = random_inputs(list(models.values()), batch, length)
            calls = {name: partial(models[key], **inputs) for name, key in names.items()}
            for name, timing in take_turns(calls, settings.repeats, cpu, pause=PAUSE).items():
                found[names[name]].append(FormatTiming(batch=batch, length=length, timing=timing))
            progress(Progress("time formats", done, len(settings.points), "shapes"))
    return found
