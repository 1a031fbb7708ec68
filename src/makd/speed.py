"""`makd bench`: how fast a student is beside its teacher, and a student that is faster.

names -> models on one device, in one dtype -> forwards that take turns (`evaluation.speed`) -> by choice both models in
the formats that they may be served in (`evaluation.formats`) -> the student's card, bench.json, and by choice a folder
with the student whose slow linears are dense again
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy import resolve
from makd.checkpoint import stored_dtype
from makd.config import Recipe, find_device
from makd.errors import ModelLoadError, OutputError, SettingError
from makd.evaluation import bytes_on_disk, fingerprint, parameter_counts
from makd.evaluation.formats import FormatRow, measure_formats
from makd.evaluation.speed import BenchConfig, Speed, measure_speed
from makd.kinds import takes
from makd.loading import check_dtype, load_model, locate
from makd.measures import compares_pair
from makd.pipeline import data_of
from makd.plain_json import read_json
from makd.preparation import Data
from makd.processes.started import check_alone
from makd.progress import OnProgress, reporting
from makd.run import model_of, start_run
from makd.run_files import FOLDER, PAGE
from makd.run_folder import MANIFEST, OutputFolder, describe_environment, folded_card, write_json
from makd.run_folder.speed import BENCH_FILE, write_speed
from makd.student.folding import fold as folded_copy
from makd.student.folding import fold_


@dataclass(frozen=True)
class BenchReport:
    """What a bench found, and what it wrote."""

    speed: Speed
    formats: tuple[FormatRow, ...]
    """Teacher and student in the formats that were asked for."""
    settings: BenchConfig
    environment: dict[str, Any]
    card: Path | None
    """The student's folder whose README.md and bench.json hold the table now."""
    folder: Path | None
    """Where the student with dense linears is, if it was asked for."""


@takes
def bench(
    student: str | PreTrainedModel,
    teacher: str | PreTrainedModel,
    settings: BenchConfig | None = None,
    *,
    card: bool = True,
    fold: bool = False,
    output: str | Path | None = None,
    overwrite: bool = False,
    head: str = "auto",
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    data: Data | None = None,
    on_progress: OnProgress | None = None,
) -> BenchReport:
    """Time a student against its teacher: factored, with every linear folded back to dense, and the best mixture.

    Args:
        student: folder of a student; or a student.
        teacher: that it was made from, as `compress` takes it.
        settings: what is timed, and on what; None takes the defaults.
        card: whether the table goes into the card of the student, with a bench.json beside it. Only a student that is
            given as a folder has one.
        fold: whether to save the student with those linears dense where factored is slower at `settings.point`.
        output: folder for that student; needed with `fold`.
        overwrite: whether a folder that is not empty may be replaced.
        head: which head the teacher is loaded with; `auto` takes the checkpoint's own.
        tokenizer: where the tokenizer is that formats are measured with, if not with the teacher; or a tokenizer.
        data: held-out rows of it say how good the models are in each of `settings.formats`; None takes what a saved
            student was made with.
        on_progress: called with a `Progress` after each unit of work, for progress bars.

    Returns:
        The timings, and what was written.

    Raises:
        MakdError: with what was wrong, which value, and what is allowed. Nothing that was on disk is lost.
    """
    check_alone("A bench", "Start it without torchrun or accelerate launch: others at work would spoil its times.")
    settings = settings or BenchConfig()
    if fold != (output is not None):
        raise SettingError("fold and output belong together: --fold --output FOLDER saves the faster student there.")
    for name, value in (("data", data), ("tokenizer", tokenizer)):
        if value is not None and not settings.formats:
            raise SettingError(
                f"{name} is for the formats that models are measured in, and none is asked for: times depend on no "
                "text. Give formats (--formats), or leave it out."
            )
    source = _folder_of(student)
    if settings.formats and data is None:
        if source is None:
            raise SettingError("formats are measured on data, and a student in hand does not say which: give data.")
        data = data_of(str(source))
    with ExitStack() as stack:
        target = None
        if output is not None:
            inputs = [source, *(model for model in (student, teacher) if isinstance(model, str))]
            target = stack.enter_context(OutputFolder(Path(output), overwrite=overwrite, inputs=inputs))
        return _bench(student, teacher, settings, card, source, target, head, tokenizer, data, on_progress)


def _bench(
    student: str | PreTrainedModel,
    teacher: str | PreTrainedModel,
    settings: BenchConfig,
    card: bool,
    source: Path | None,
    target: OutputFolder | None,
    head: str,
    tokenizer: str | PreTrainedTokenizerBase | None,
    data: Data | None,
    on_progress: OnProgress | None,
) -> BenchReport:
    if card and source is not None and not os.access(source, os.W_OK):
        raise OutputError(f"{source} cannot be written to, so its card cannot hold the table. Give --card false.")
    recipe = Recipe(device=settings.device, dtype=settings.dtype, head=head)
    device, dtype = find_device(settings.device, wide=False), check_dtype(settings.dtype)
    formats: tuple[FormatRow, ...] = ()
    if settings.formats and data is not None:
        formats = _in_formats(student, teacher, settings, tokenizer, data, recipe, on_progress)
    with reporting("load", on_progress):
        ours, theirs = _loaded(student, "auto", dtype, device), _loaded(teacher, head, dtype, device)
    speed = measure_speed(ours, theirs, settings, on_progress)
    environment = {
        **describe_environment(device, recipe.seed),
        "threads": settings.threads or torch.get_num_threads(),
        "dtype": settings.dtype,
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    written = source if card else None
    if written is not None:
        write_speed(written, speed, formats, settings, environment)
    if target is not None:
        _save_folded(student, source, speed, target)
        write_speed(target.path, speed, (), settings, environment)
    return BenchReport(speed, formats, settings, environment, written, None if target is None else target.path)


def _in_formats(
    student: str | PreTrainedModel,
    teacher: str | PreTrainedModel,
    settings: BenchConfig,
    tokenizer: str | PreTrainedTokenizerBase | None,
    data: Data,
    recipe: Recipe,
    on_progress: OnProgress | None,
) -> tuple[FormatRow, ...]:
    """Both models in each format, measured as `evaluate` measures."""
    with start_run(teacher, data, recipe, None, tokenizer, False, False, on_progress, student) as run:
        model = model_of(student, run.recipe, run.teacher.device)
        return measure_formats(model, run.teacher, run.tokenizer, settings, run.score, on_progress)


def _folder_of(student: str | PreTrainedModel) -> Path | None:
    """The folder of a student on this disk; None for one in hand or on the hub."""
    if not isinstance(student, str):
        return None
    folder = Path(locate(student).folder)
    return folder if folder.is_dir() else None


def _loaded(model: str | PreTrainedModel, head: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model, loaded if it is a name; one in hand must be where and what the settings say."""
    if isinstance(model, str):
        return load_model(model, head, dtype, device)
    if model.dtype != dtype or model.device.type != device.type:
        raise SettingError(
            f"The {type(model).__name__} in hand is {str(model.dtype).removeprefix('torch.')} on {model.device}, and "
            f"the bench is of {str(dtype).removeprefix('torch.')} on {device}. Move it, or give its dtype and device."
        )
    return model


def _save_folded(student: str | PreTrainedModel, source: Path | None, speed: Speed, target: OutputFolder) -> None:
    """Write the student with `speed.fold` dense to `target`, and what else it had in its folder.

    A saved student is read again, in its own dtype: a bench in bfloat16 is no reason to round its weights.
    """
    if isinstance(student, str):
        dtype = stored_dtype(locate(student).folder) or torch.float32
        model = load_model(student, dtype=dtype)
        fold_(model, speed.fold)
    else:
        model = folded_copy(student, speed.fold)
    with target.work() as result:
        if source is not None:
            _copy_companions(source, result, with_findings=not speed.fold)
        model.save_pretrained(result)
        _update_metrics(model, result, target.path.name, speed.fold)


def _copy_companions(source: Path, result: Path, *, with_findings: bool) -> None:
    """Copy what stands beside the weights of a student: tokenizer, recipe, card, pooling.

    `with_findings` takes what its run found for a report, too: ranks and errors of the linears as they are there.
    """
    weights = (
        "*.safetensors",
        "*.safetensors.index.json",
        "config.json",
        BENCH_FILE,
        MANIFEST,
        "*.part",
        "checkpoints",
        *(() if with_findings else (FOLDER,)),
        PAGE,
    )
    ignored = shutil.ignore_patterns(*weights)

    def ignore(folder: str, names: list[str]) -> set[str]:  # a subfolder's files are of other modules than the model
        return ignored(folder, names) if Path(folder) == source else set()

    shutil.copytree(source, result, ignore=ignore, dirs_exist_ok=True)


def _update_metrics(model: PreTrainedModel, result: Path, name: str, folded: Sequence[str]) -> None:
    """The copied metrics.json and card are made those of the student that has the linears `folded` dense again.

    Fidelity stays: the outputs are the same but for rounding. Latency goes: bench.json has it.
    """
    file, card = result / "metrics.json", result / "README.md"
    if not file.is_file():
        return
    advice = "Remove it, or copy the student's folder again."
    old = read_json(file, dict, ModelLoadError, advice)
    gone = ["latency_ms", "latency_tokens", *(["shared_inputs"] if folded else [])]
    new = {key: value for key, value in old.items() if key not in gone}
    counts = parameter_counts(model, resolve(model))
    if compares_pair(old):
        new["params"] = {key: {**sides, "student": counts[key]} for key, sides in old["params"].items()}
        new["bytes"] = {**old["bytes"], "student": bytes_on_disk(result)}
    else:  # a student that `makd finetune` taught has numbers of its own alone
        new |= {"params": {"total": counts["total"]}, "bytes": bytes_on_disk(result)}
    if folded:
        new["folded"] = [*old.get("folded", []), *folded]
    if "fingerprint" in old:
        new["fingerprint"] = fingerprint(model)
    write_json(file, new)
    if card.is_file():
        written = result / "environment.json"
        environment = read_json(written, dict, ModelLoadError, advice) if written.is_file() else {}
        text = card.read_text(encoding="utf-8")
        card.write_text(folded_card(text, name, old, new, environment), encoding="utf-8")
