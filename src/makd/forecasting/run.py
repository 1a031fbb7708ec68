"""Before the flow: what a whole run will take, from the teacher's config and the text; and whether it fits here.

The teacher's weights are not loaded: its architecture is built empty. Nothing is written.
"""

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy import Anatomy
from makd.anatomy.limits import token_limit
from makd.calibration.store import MEMORY_LIMIT
from makd.capture import examine
from makd.config import Recipe
from makd.data import choose_tokenizer
from makd.distill import LayerTeacher, training_lengths
from makd.distill.engines.support import is_sharding_asked
from makd.errors import ModelLoadError, SettingError
from makd.factorization.assemble import linear_sizes
from makd.factorization.room import find_available
from makd.factorization.settings import FactorizeConfig
from makd.factorization.streamed import check_streamable
from makd.forecasting.fit import check_fits, check_memory
from makd.forecasting.machine import measure_machine
from makd.forecasting.memory import Memory
from makd.forecasting.operations import TextShape
from makd.forecasting.outcome import Command, RunForecast
from makd.forecasting.shapes import shape_of
from makd.forecasting.student import Forecast, forecast_factorization
from makd.forecasting.training import LearnerShape, Spread, TrainingForecast, forecast_training
from makd.kinds import takes
from makd.loading import check_dtype, load_empty_model, load_model, locate
from makd.preparation import Data, RunData, prepare
from makd.processes.first import in_first
from makd.processes.started import process_count
from makd.ranks.budget import Budget
from makd.source_names import name_of
from makd.start import reads_text, start_settings
from makd.storage import find_save_dtype, stored_folder
from makd.weights.shards import stored_tensors

Batches = Iterable[Mapping[str, Tensor]]


@takes
@in_first
def forecast(
    teacher: str | PreTrainedModel,
    data: Data,
    budget: Budget,
    recipe: Recipe | None = None,
    output: str | Path = "runs/student",
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    command: str = "compress",
    stream: bool = False,
) -> RunForecast:
    """What `compress` or `factorize_only` will make of these arguments, and what it will take; nothing is written.

    The text is loaded and tokenized, and a few kernels are timed. The teacher's weights are not loaded, but for those
    of a GGUF file, which does not tell its architecture otherwise.

    Args:
        teacher: as `compress` takes it.
        data: likewise.
        budget: likewise.
        recipe: likewise.
        output: likewise; its disk is looked at.
        tokenizer: likewise.
        command: `compress`, or `factorize` for a run without training.
        stream: whether teacher and student stay on disk, as with `factorize_streamed`.

    Raises:
        MakdError: what the run itself would say of its arguments, as far as it is known without weights.
    """
    if command not in ("compress", "factorize"):
        raise SettingError(f"command is compress or factorize; got {command!r}.")
    recipe = recipe or Recipe()
    if stream and command == "compress":
        raise SettingError("stream is for command factorize: training needs the models in memory.")
    device, dtype = recipe.find_device(), check_dtype(recipe.dtype)
    model = _empty(teacher, recipe.head, dtype)
    settings = _streamed(recipe.factorize, model) if stream else start_settings(recipe, trains=command == "compress")
    needs_text = not stream or reads_text(recipe, settings)
    prepared = prepare(data, choose_tokenizer(tokenizer, teacher), model, recipe) if needs_text else None
    save = find_save_dtype(recipe.save_dtype, teacher, dtype)
    batches = [] if prepared is None else prepared.calibration
    there = find_available(device, Path(output))
    anatomy = examine(model)
    made = _forecast(model, anatomy, batches, budget, settings, save, device, recipe.layer_teacher, from_files=stream)
    training = None
    if command == "compress" and prepared is not None:
        training = _training(model, anatomy, made, recipe, prepared)
        if training is not None and any(stage.plan.writers.written for stage in recipe.trainings):
            uncounted = "the time to write completions is not counted: it may be longer than the training's own"
            made = replace(made, notes=(*made.notes, uncounted))
    speed = measure_machine(device, dtype)
    seconds = {"factorize": speed.seconds(made.operations)}
    if training is not None:
        seconds["distill"] = speed.seconds(training.operations)
    kind: Command = "compress" if command == "compress" else "factorize"
    return RunForecast(name_of(teacher), kind, anatomy, made, training, there, seconds)


def check_run(
    teacher: PreTrainedModel, data: RunData, budget: Budget, recipe: Recipe, output: Path, save: torch.dtype,
    kept: int = 0, *, trains: bool,
) -> None:  # fmt: skip
    """Refuse a run that this machine has no room for, before its work begins.

    Args:
        teacher: in memory.
        data: of the run.
        budget: of the student.
        recipe: of the run.
        output: where the student will be.
        save: dtype of the student on disk.
        kept: bytes that are on disk already, of a run that was stopped.
        trains: whether it is taught.

    Raises:
        RoomError: more memory or disk is needed than there is.
        BudgetError, SettingError, DataError: what the factorization would say.
    """
    held = sum(parameter.nbytes for parameter in teacher.parameters())
    there = find_available(teacher.device, output, held, kept)
    anatomy = examine(teacher)
    made = _forecast(
        teacher, anatomy, data.calibration, budget, start_settings(recipe, trains=trains), save, teacher.device,
        recipe.layer_teacher,
    )  # fmt: skip
    training = _training(teacher, anatomy, made, recipe, data) if trains else None
    check_fits(made, there, [] if training is None else [training.memory])


def check_stream(
    model: PreTrainedModel, batches: Batches, budget: Budget, recipe: Recipe, output: Path, save: torch.dtype, kept: int
) -> None:
    """Refuse to stream what does not fit: a teacher that stays on disk; `model` is its architecture, empty."""
    device = recipe.find_device()
    there = find_available(device, output, 0, kept)
    settings = _streamed(recipe.factorize, model)
    made = _forecast(
        model, examine(model), batches, budget, settings, save, device, recipe.layer_teacher, from_files=True
    )
    check_fits(made, there)


def check_weights(teacher: str, recipe: Recipe) -> None:
    """Refuse to load a teacher whose weights alone are more than this machine's memory.

    Args:
        teacher: its name; of what is not on this machine in safetensors nothing is known.
        recipe: dtype and device.

    Raises:
        RoomError: the weights alone are more than the memory.
    """
    numbers = 0
    with suppress(ModelLoadError):  # what is wrong with the files, whoever loads them says
        folder = None if locate(teacher).gguf_file is not None else stored_folder(teacher)
        for _, tensor in () if folder is None else stored_tensors(folder):
            numbers += tensor.nbytes // tensor.dtype.itemsize
    weights = numbers * check_dtype(recipe.dtype).itemsize
    check_memory([Memory("weights", weights)], 0, find_available(recipe.find_device(), Path()))


def _empty(teacher: str | PreTrainedModel, head: str, dtype: torch.dtype) -> PreTrainedModel:
    if isinstance(teacher, PreTrainedModel):
        return teacher
    if locate(teacher).gguf_file is not None:
        return load_model(teacher, head, dtype)
    return load_empty_model(teacher, head, dtype)[0]


def _streamed(settings: FactorizeConfig, model: PreTrainedModel) -> FactorizeConfig:
    """What these settings are from files to files."""
    check_streamable(settings)
    return replace(settings.for_model(examine(model)), vocabulary="dense", depth="all")


def _forecast(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Batches,
    budget: Budget,
    settings: FactorizeConfig,
    save: torch.dtype,
    device: torch.device,
    teach: LayerTeacher | None,
    *,
    from_files: bool = False,
) -> Forecast:
    """With its store where the walk will have it."""
    text = TextShape(tuple((len(batch["input_ids"]), batch["input_ids"].shape[1]) for batch in batches))

    def forecast_with(store: str) -> Forecast:
        return forecast_factorization(
            model, anatomy, budget, settings, text,
            from_files=from_files, store=store, save_itemsize=save.itemsize,
            beside=torch.get_num_threads() if device.type == "cpu" else 1, teach=teach,
        )  # fmt: skip

    if from_files or settings.store == "disk":
        return forecast_with("disk")
    found = forecast_with("memory")
    if settings.store == "auto" and found.store_bytes > MEMORY_LIMIT:
        return forecast_with("disk")
    return found


def _training(
    model: PreTrainedModel, anatomy: Anatomy, made: Forecast, recipe: Recipe, data: RunData
) -> TrainingForecast | None:
    dtype = check_dtype(recipe.dtype)
    stages = [
        replace(stage, training=stage.training.with_products_in(dtype))
        for stage in recipe.trainings
        if stage.training.steps != 0
    ]
    if not stages:
        return None
    shape = shape_of(model, anatomy, linear_sizes(model, anatomy))
    student = LearnerShape(
        parameters=made.student_parameters,
        linears=made.student_linears,
        kept=made.student_linears / made.teacher_linears,
        factors=tuple(
            (made.sizes[name].in_features, rank, made.sizes[name].out_features)
            for name, rank in made.ranks.items()
            if rank is not None and name in anatomy.linears
        ),
    )
    lengths = [training_lengths(data.train, stage.plan.writers, token_limit(model)) for stage in stages]
    return forecast_training(shape, student, stages, lengths, recipe.cache is None, _spread())


def _spread() -> Spread:
    """As what started this process says."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return Spread(is_known=False)
    return Spread(process_count()) if is_sharding_asked() else Spread()
