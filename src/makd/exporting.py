"""A saved student as files for other runtimes: `makd export`.

Stands where the runs stand: it loads by name, and lets `export/` write into a folder that appears when all is checked.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.checkpoint import stored_dtype
from makd.errors import ModelLoadError, SettingError
from makd.export import Agreement, ExportConfig, save_dense, save_gguf, save_onnx, save_program
from makd.export.dense import write_plain_config
from makd.export.gguf import find_converter
from makd.kinds import takes
from makd.loading import load_tokenizer, locate, modes_kept, take_model
from makd.plain_json import read_json
from makd.processes.started import check_alone
from makd.run_folder import OutputFolder, describe_environment, write_json
from makd.sentence_encoder import copy_companions, origin_of

logger = logging.getLogger(__name__)

EXPORT_FILE = "makd_export.json"
WORTH_A_WARNING = 0.1
"""Relative error from which rounding is warned of."""


@dataclass(frozen=True)
class ExportReport:
    """What was written."""

    folder: Path
    settings: ExportConfig
    bytes: dict[str, int]
    """Of each file that holds the model."""
    agreement: Agreement | None
    """How far its outputs are from the student's; None for a GGUF that transformers does not read."""


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
    with modes_kept(student), OutputFolder(Path(output), overwrite=overwrite, inputs=[named]) as folder:
        model = _take(student, settings, head)
        tokenizer = None if named is None else load_tokenizer(named)
        with folder.work() as result:
            agreement = _write(model, settings, result, tokenizer)
            if agreement is not None and agreement.relative_error > WORTH_A_WARNING:
                logger.warning(
                    "Rounding moves the outputs by %.0f %% of their norm (on random tokens): measure it on your own "
                    "data before it is served.",
                    100 * agreement.relative_error,
                )
            report = ExportReport(folder.path, settings, _sizes(result), agreement)
            content = {
                "student": named or type(model).__name__,
                "settings": settings,
                "bytes": report.bytes,
                "agreement": agreement,
                "environment": describe_environment(torch.device("cpu"), 0),
            }
            write_json(result / EXPORT_FILE, content)
        return report


def _take(student: str | PreTrainedModel, settings: ExportConfig, head: str) -> PreTrainedModel:
    """The model in float32; a dense copy has the numbers that its student is stored in, and is as large."""
    dtype = None
    if isinstance(student, str) and settings.to == "dense":
        dtype = stored_dtype(locate(student).folder)
    model = take_model(student, head, dtype or torch.float32, torch.device("cpu"))
    if not isinstance(student, str) and model.dtype != torch.float32:
        raise SettingError(
            f"The {type(model).__name__} in hand is {str(model.dtype).removeprefix('torch.')}; it is exported in "
            "float32. Give model.float()."
        )
    return model


def _write(
    model: PreTrainedModel, settings: ExportConfig, result: Path, tokenizer: PreTrainedTokenizerBase | None
) -> Agreement | None:
    if settings.llama_cpp is not None:
        work = result / "dense"  # goes with the result if the run is killed
        work.mkdir()
        _write_tokenizer(model, tokenizer, work)
        agreement = save_gguf(
            model, result, work,
            llama_cpp=settings.llama_cpp, numbers=settings.gguf_type, tolerance=settings.tolerance,
        )  # fmt: skip
        shutil.rmtree(work)
        return agreement  # a GGUF holds its tokenizer and its config
    _write_tokenizer(model, tokenizer, result)
    if settings.to == "dense":
        return save_dense(model, result, tolerance=settings.tolerance)
    write_plain_config(model, result)
    if settings.to == "torch":
        return save_program(model, result, tolerance=settings.tolerance, tokenizer=tokenizer)
    return save_onnx(model, result, quantize=settings.quantize, tolerance=settings.tolerance, tokenizer=tokenizer)


def _write_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _name_plainly(folder / "tokenizer_config.json")
    copy_companions(origin_of(model), folder)


def _name_plainly(file: Path) -> None:
    """Give a tokenizer without a class of its own the name that transformers before 5 knows, and 5 does too."""
    content = read_json(file, dict, ModelLoadError, "Copy the tokenizer's files again.")
    if content.get("tokenizer_class") == "TokenizersBackend":
        write_json(file, {**content, "tokenizer_class": "PreTrainedTokenizerFast"})


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file that holds weights."""
    kinds = (".onnx", ".onnx_data", ".safetensors", ".pt2", ".gguf")
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.suffix in kinds}
