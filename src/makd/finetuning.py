"""`makd finetune`: a model is taught a task from its labels, without a teacher.

So the teachers of tasks are made, and students of models that knew no task are taught one; a student stays factored.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from makd.anatomy.sizes import total_parameters
from makd.aspects import Completions
from makd.config import FinetuneRecipe
from makd.data import choose_tokenizer, collator, row_lengths
from makd.distill import (
    CHECKPOINT_SIZES,
    ReportSteps,
    SupervisedTrainer,
    check_adapters,
    check_engine,
    check_same_everywhere,
    check_same_run,
    float32_weights,
    identify_run,
    learning,
    train,
    warn_slow_bfloat16,
    with_start,
    write_identity,
)
from makd.distill.engines.support import is_sharding_asked
from makd.errors import SettingError
from makd.evaluation import bytes_on_disk, fingerprint, stored_bytes
from makd.kinds import takes
from makd.loading import check_dtype
from makd.pipeline import Report
from makd.processes.first import in_first, in_turn, is_shared
from makd.processes.started import is_first
from makd.progress import OnProgress, nobody, reporting
from makd.random_state import keeping_random_state
from makd.run_folder import OutputFolder, describe_environment, plain, write_json, write_recipe
from makd.source_names import tokenizer_name
from makd.storage import find_save_dtype
from makd.student.hub import is_student, mark_student
from makd.tasks import Task, TaskConfig, load_task_model, read_task, tokenize_task
from makd.weights.sound import check_finite, round_weights_, stored_in

logger = logging.getLogger(__name__)


@takes
@keeping_random_state()
def finetune(
    model: str,
    task: TaskConfig,
    recipe: FinetuneRecipe | None = None,
    output: str | Path = "runs/teacher",
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: OnProgress | None = None,
) -> Report:
    """Teach `model` a task, measure it on the task's validation rows and save it.

    Args:
        model: hub id, folder, or `package:module/path`; a student's folder, too. Without the task's head it gets a new,
            seeded one.
        task: what it is taught.
        recipe: how long and how fast; None takes the defaults.
        output: folder for the model, its tokenizer, `recipe.yaml`, `metrics.json` and `environment.json`. It appears
            when all is done; until then the work stands beside it.
        tokenizer: where the tokenizer is, if not with the model; or a tokenizer.
        overwrite: whether a folder that is not empty may be replaced.
        resume: go on from the last checkpoint of a run that was stopped (`training.save_every` keeps them).
        on_progress: called with a `Progress` after each unit of work, for progress bars.

    Returns:
        The measurements, and where the model is.

    Raises:
        MakdError: with what was wrong, which value, and what is allowed.
    """
    started, recipe = time.perf_counter(), recipe or FinetuneRecipe()
    if task.extra_text is not None:
        raise SettingError(
            f"A fine-tuning learns from labels, and task.extra_text ({task.extra_text}) has none. Leave it out here; "
            "`makd compress` and `makd distill` teach a student with it."
        )
    if is_sharding_asked():
        raise SettingError("A fine-tuning has its model whole in each process, and FSDP is asked for. Leave FSDP out.")
    if recipe.training.steps != 0:
        recipe.training.with_products_in(check_dtype(recipe.dtype)).check_launch()
    inputs = [model, task.path or task.known.path, tokenizer_name(tokenizer)]
    with OutputFolder(Path(output), overwrite=overwrite, resume=resume, inputs=inputs) as folder:
        progress = on_progress if on_progress is not None and is_first() else nobody
        with reporting("load", progress):
            tuning = in_turn(lambda: _load(model, task, recipe, folder, tokenizer, progress))
        if is_shared():
            data = tuning.data
            check_same_everywhere(identify_run(plain(recipe), data.train, data.tokenizer, tuning.learner))
        identity = _identify(tuning)
        with folder.work() as result:
            _check_begin(tuning, identity)
            with float32_weights(tuning.learner):
                tokens, tuning.seconds["train"] = _train(tuning)
            return _finish(tuning, tokens, result, started)


@dataclass
class _FineTuning:
    """What is taught, and where the result goes. Of several processes each has its own; the first checks and writes."""

    model: str
    task: TaskConfig
    recipe: FinetuneRecipe
    folder: OutputFolder
    progress: OnProgress
    tokenizer_name: str | None
    device: torch.device
    words: PreTrainedTokenizerBase
    learner: PreTrainedModel
    save_dtype: torch.dtype
    data: Task
    seconds: dict[str, float] = field(default_factory=dict)


def _load(
    model: str,
    task: TaskConfig,
    recipe: FinetuneRecipe,
    folder: OutputFolder,
    tokenizer: str | PreTrainedTokenizerBase | None,
    progress: OnProgress,
) -> _FineTuning:
    device = recipe.find_device()
    if recipe.uses_bfloat16:
        warn_slow_bfloat16(device)
    words = choose_tokenizer(tokenizer, model)
    rows = read_task(task)
    learner = load_task_model(model, rows, words, recipe.seed, check_dtype(recipe.dtype), device)
    check_learner(learner, recipe)
    save_dtype = find_save_dtype(recipe.save_dtype, model, check_dtype(recipe.dtype))
    data = tokenize_task(rows, words, learner, recipe.seed)
    name = tokenizer_name(tokenizer)
    return _FineTuning(model, task, recipe, folder, progress, name, device, words, learner, save_dtype, data)


def check_learner(learner: PreTrainedModel, recipe: FinetuneRecipe) -> None:
    """Refuse a `learner` that cannot be fine-tuned as `recipe` says, before any work.

    Raises:
        SettingError: adapters have nothing to go on; or as `check_engine` raises it.
    """
    if recipe.training.steps != 0:
        check_adapters(recipe.training, learner)
        check_engine(learner, recipe.training, Completions())


@in_first
def _identify(tuning: _FineTuning) -> dict[str, Any]:
    """What a run that resumes is compared by, but for the weights; empty where no checkpoints are kept."""
    recipe = tuning.recipe
    if not (tuning.folder.resume or recipe.training.save_every):
        return {}
    known = {name: value for name, value in plain(recipe).items() if name not in ("evaluation_batch_size", "device")}
    settings = {"command": "finetune", **known, "device": tuning.device.type}
    return identify_run(settings, tuning.data.train, tuning.data.tokenizer)


@in_first
def _check_begin(tuning: _FineTuning, identity: dict[str, Any]) -> None:
    """Refuse to resume another run, or to begin with what the disk has no room for; note what this run is of."""
    folder, learner = tuning.folder, tuning.learner
    if identity:
        whole = with_start(identity, learner)
        if folder.resume:
            check_same_run(folder.identity, whole)
        else:
            write_identity(folder.identity, whole)
    keeps = tuning.recipe.training.save_every is not None and not folder.resume
    folder.check_room(stored_bytes(learner) * (1 + (CHECKPOINT_SIZES if keeps else 0)))


@in_first
def _finish(tuning: _FineTuning, tokens: int, result: Path, started: float) -> Report:
    """Measure the model as it is saved, and write it with what belongs to it."""
    learner, recipe = tuning.learner, tuning.recipe
    round_weights_(learner, tuning.save_dtype)
    check_finite(learner, "The fine-tuned model")
    start = time.perf_counter()
    found = tuning.data.evaluate(learner, recipe.evaluation_batch_size, tuning.progress)
    tuning.seconds["evaluate"] = time.perf_counter() - start
    mark_student(learner)  # a new head changed what its config counts
    with stored_in(learner, tuning.save_dtype):
        learner.save_pretrained(result)
    tuning.words.save_pretrained(result)
    metrics = {
        "task": {"name": tuning.task.name, "splits": list(tuning.data.evaluation), "after": found},
        "params": {"total": total_parameters(learner)},
        "bytes": bytes_on_disk(result),
        "seconds": {**tuning.seconds, "total": time.perf_counter() - started},
        "tokens": {"training": tokens, "evaluation": tuning.data.count_tokens(learner)},
        "fingerprint": fingerprint(learner),
    }
    settings: dict[str, Any] = {"model": tuning.model, "task": tuning.task, "recipe": recipe}
    write_recipe(result, {**settings, "output": tuning.folder.path, "tokenizer": tuning.tokenizer_name})
    write_json(result / "metrics.json", metrics)
    write_json(result / "environment.json", describe_environment(tuning.device, recipe.seed))
    return Report(tuning.folder.path, metrics, is_student(learner))


def _train(tuning: _FineTuning) -> tuple[int, float]:
    """Train in place; gives the real tokens that were read, and the seconds that it took."""
    model, task, recipe, checkpoints = tuning.learner, tuning.data, tuning.recipe, tuning.folder.checkpoints
    training = recipe.training.with_products_in(check_dtype(recipe.dtype))
    if training.steps == 0:
        return 0, 0.0
    inside = {id(one) for name, one in model.base_model.named_parameters() if not name.startswith("pooler.")}
    start = time.perf_counter()
    with learning(model, training, recipe.seed):
        for parameter in model.parameters():
            if id(parameter) not in inside:  # head and pooler, which may be new, always learn
                parameter.requires_grad_(True)
        # batches of rows as they come, unless tokens are asked for: so teachers of tables were made
        tokens = None if training.tokens_per_batch is None else training.find_tokens(row_lengths(task.train))
        trainer = SupervisedTrainer(
            model,
            training.student_dropout,
            tokens_per_batch=tokens,
            args=training.to_arguments(checkpoints, recipe.seed, model.device.type == "cpu"),
            train_dataset=task.train,
            eval_dataset=task.held_out,
            data_collator=collator(task.tokenizer, model),
            callbacks=[ReportSteps(tuning.progress, "fine-tune")],
        )
        trainer.remove_callback(PrinterCallback)  # prints log lines as dicts; ours go through logging
        read = train(trainer, checkpoints, tuning.folder.resume)
    model.eval()
    return read, time.perf_counter() - start
