"""A saved student as files for other runtimes: `makd export`.

Stands where the runs stand: it loads by name, and lets `export/` write into a folder that appears when all is checked.
"""

import logging
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.errors import SettingError
from makd.export import Agreement, ExportConfig, save_dense, save_gguf, save_onnx, save_program
from makd.export.dense import write_plain_config
from makd.export.gguf import find_converter
from makd.kinds import takes
from makd.loading import load_model, load_tokenizer, locate
from makd.processes.started import check_alone
from makd.report import OutputFolder, describe_environment, write_json
from makd.report.beside import RECORDS, copy_beside

logger = logging.getLogger(__name__)

EXPORT_FILE = "makd_export.json"
WORTH_A_WARNING = 0.1
"""Relative error of a quantized file from which it is told."""


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    folder: Path
    settings: ExportConfig
    bytes: dict[str, int]
    """Of each file that holds the model."""
    agreement: Agreement | None
    """How far its outputs are from the student's; None for a GGUF that transformers does not read."""
    seconds: float


@takes
def export(
    student: str | PreTrainedModel,
    settings: ExportConfig,
    output: str | Path,
    *,
    head: str = "auto",
    overwrite: bool = False,
) -> ExportReport:
    """Write a student, or any model, as files that other runtimes open, after they were compared with it.

    Args:
        student: folder or hub id, `.gguf` file, or `package:module/path`; or a model.
        settings: the format, and how it is written.
        output: folder for the files, with the tokenizer's and sentence-transformers' own, and what was measured in
            `makd_export.json`. It appears when all is done.
        head: which head the model is loaded with; `auto` takes the checkpoint's own.
        overwrite: whether a folder that is not empty may be replaced.

    Returns:
        What was written, and how far its outputs are from the student's.

    Raises:
        ExportError: the model cannot be written so, or the file does not compute what the model computes.
        MakdError: with what was wrong, which value, and what is allowed. Nothing that was on disk is lost.
    """
    check_alone("An export", "Start it without torchrun or accelerate launch.")
    if settings.llama_cpp is not None:
        find_converter(settings.llama_cpp)
    named = student if isinstance(student, str) else None
    with OutputFolder(Path(output), overwrite=overwrite, inputs=[named]) as folder:
        model = load_model(student, head) if isinstance(student, str) else _in_float32(student)
        source = None if named is None else Path(locate(named).folder)
        source = source if source is not None and source.is_dir() else None
        tokenizer = None if named is None else load_tokenizer(named)
        with folder.work() as result:
            begun = time.perf_counter()
            if source is not None:
                copy_beside(source, result, RECORDS)
            elif tokenizer is not None:
                tokenizer.save_pretrained(result)
            agreement = _write(model, settings, result, tokenizer)
            report = ExportReport(folder.path, settings, _sizes(result), agreement, time.perf_counter() - begun)
            content = {
                "student": named or type(model).__name__,
                "settings": asdict(settings),
                "bytes": report.bytes,
                "agreement": None if agreement is None else asdict(agreement),
                "environment": describe_environment(torch.device("cpu"), 0),
            }
            write_json(result / EXPORT_FILE, content)
        return report


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise SettingError(
            f"The {type(model).__name__} in hand is {str(model.dtype).removeprefix('torch.')} on {model.device}; it is "
            "exported in float32 from the CPU. Give model.float().cpu()."
        )
    return model


def _write(
    model: PreTrainedModel, settings: ExportConfig, result: Path, tokenizer: PreTrainedTokenizerBase | None
) -> Agreement | None:
    if settings.to == "dense":
        return save_dense(model, result, tolerance=settings.tolerance)
    if settings.to == "gguf":
        assert settings.llama_cpp is not None
        with TemporaryDirectory(dir=result.parent) as work:
            copy_beside(result, Path(work))
            for path in result.iterdir():  # a GGUF holds its tokenizer
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            return save_gguf(model, result, work, llama_cpp=settings.llama_cpp, numbers=settings.gguf_type)
    if settings.to == "torch":
        agreement = save_program(model, result, tolerance=settings.tolerance, tokenizer=tokenizer)
    else:
        agreement = save_onnx(
            model, result, quantize=settings.quantize, tolerance=settings.tolerance, tokenizer=tokenizer
        )
        if agreement.relative_error > WORTH_A_WARNING:
            logger.warning(
                "int8 moves the outputs by %.0f %% of their norm (on random tokens): measure it on your own data "
                "before it is served.",
                100 * agreement.relative_error,
            )
    write_plain_config(model, result)
    return agreement


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file that holds weights."""
    kinds = (".onnx", ".onnx_data", ".safetensors", ".pt2", ".gguf")
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.suffix in kinds}
