"""The whole method on one page. Read this first; the folders are its stations, in this order."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed

from makd.anatomy import resolve
from makd.aspects import activate
from makd.cache import TeacherCache
from makd.config import Recipe, Stage
from makd.data import DataConfig, collator, count_tokens, reads_blocks, row_lengths
from makd.distill import DistillTrainer, ReportSteps, choose_trainable_, train
from makd.errors import DataError
from makd.evaluation import bytes_on_disk, fidelity, fingerprint, latency, parameter_counts, perplexity, stored_bytes
from makd.loading import check_dtype, locate, take_model, take_tokenizer
from makd.lowrank.budget import Budget
from makd.lowrank.factorize import factorize
from makd.lowrank.outcome import FactorizeReport
from makd.preparation import Data, RunData, prepare
from makd.registry import make_settings
from makd.report import (
    OutputFolder,
    copy_sentence_transformers_files,
    describe_environment,
    write_card,
    write_json,
    write_recipe,
)
from makd.tasks import TaskConfig

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, how much is done, of how much)."""


@dataclass(frozen=True)
class Report:
    """What a run found, and where the student is."""

    folder: Path
    metrics: dict[str, Any]
    """The content of `metrics.json`."""


def compress(
    teacher: str | PreTrainedModel,
    data: Data,
    budget: Budget,
    recipe: Recipe | None = None,
    output: str | Path = "runs/student",
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: Progress | None = None,
) -> Report:
    """Make a student of `teacher` within `budget`, teach it, measure it and save it.

    Args:
        teacher: hub id, folder, `.gguf` file, or `package:module/path` of a model inside a Python package; or a model.
        data: what to calibrate, train and evaluate on: a `DataConfig`, its path alone, a list of texts; or a
            `TaskConfig`, whose labels are for the plan's `task` and whose metrics are measured too.
        budget: how many parameters the student may have.
        recipe: how it is made; None takes the defaults.
        output: folder for the student, its tokenizer, `recipe.yaml`, `metrics.json` and `environment.json`. It appears
            when all is done; until then the work stands beside it.
        tokenizer: where the tokenizer is, if not with the teacher; or a tokenizer.
        overwrite: whether a folder that is not empty may be replaced.
        resume: go on from the last checkpoint of a run that was stopped (`training.save_every` keeps them).
        on_progress: called as the work goes on, for progress bars.

    Returns:
        The measurements, and where the student is.

    Raises:
        MakdError: with what was wrong, which value, and what is allowed. Nothing that was on disk is lost.
    """
    run = _start(teacher, data, recipe, output, tokenizer, overwrite, resume, on_progress)
    run.open_cache()
    student = _factorize(run, budget)
    run.scores["before"] = run.score(student)
    with run.folder.work() as result:
        _distill(run, student)
        run.scores["after"] = run.score(student)
        return _finish(run, student, result, "compress", {"budget": budget})


def factorize_only(
    teacher: str | PreTrainedModel,
    data: Data,
    budget: Budget,
    recipe: Recipe | None = None,
    output: str | Path = "runs/student",
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Report:
    """Make a student and measure it, without training. Arguments and errors are those of `compress`."""
    run = _start(teacher, data, recipe, output, tokenizer, overwrite, False, on_progress)
    student = _factorize(run, budget)
    with run.folder.work() as result:
        run.scores["after"] = run.score(student)
        return _finish(run, student, result, "factorize", {"budget": budget})


def distill(
    student: str | PreTrainedModel,
    teacher: str | PreTrainedModel,
    data: Data,
    recipe: Recipe | None = None,
    output: str | Path = "runs/student",
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: Progress | None = None,
) -> Report:
    """Teach a saved `student` (further). Arguments and errors are those of `compress`."""
    run = _start(teacher, data, recipe, output, tokenizer, overwrite, resume, on_progress)
    run.open_cache()
    model = _model(student, run.recipe, run.teacher.device)
    run.scores["before"] = run.score(model)
    with run.folder.work() as result:
        _distill(run, model)
        run.scores["after"] = run.score(model)
        return _finish(run, model, result, "distill", {"student": _name(student)})


def evaluate(
    student: str | PreTrainedModel,
    teacher: str | PreTrainedModel,
    data: Data,
    recipe: Recipe | None = None,
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a saved `student` against `teacher` on held-out text: what `metrics.json` holds, without the training."""
    run = _start(teacher, data, recipe, None, tokenizer, False, False, on_progress)
    model = _model(student, run.recipe, run.teacher.device)
    run.scores["after"] = run.score(model)
    return run.measure(model, stored_bytes(model))


def data_of(student: str) -> DataConfig | TaskConfig:
    """The data or task that a saved student was made with, as its `recipe.yaml` says; the built-in text if it has none.

    Raises:
        DataError: it was made with a list of texts, which the recipe does not hold.
        UnknownNameError: the recipe has a setting that there is not.
    """
    recipe = Path(locate(student).folder) / "recipe.yaml"
    if not recipe.is_file():
        return DataConfig()
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    if written.get("task") is not None:
        return make_settings(TaskConfig, "setting of a task", written["task"])
    settings = written["data"]
    if settings is None:
        raise DataError(f"{student} was made with texts in hand, not kept in its recipe.yaml. Give --data.path.")
    return make_settings(DataConfig, "setting of data", settings)


@dataclass
class _Run:
    """What the stages of one run share."""

    teacher_name: str
    recipe: Recipe
    folder: OutputFolder
    progress: Progress
    tokenizer_name: str | None
    """None when it came with the teacher."""
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    resume: bool
    started: float
    cache: TeacherCache | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    training_tokens: int = 0
    shared_inputs: list[dict[str, Any]] = field(default_factory=list)

    def open_cache(self) -> None:
        """Open the recipe's teacher cache, before any work that a stale one would make useless."""
        plans = [stage.plan for stage in self.recipe.trainings if stage.training.steps != 0]
        if self.recipe.cache is not None and plans:
            where, data = self.recipe.cache, self.data
            self.cache = TeacherCache.open(where, self.teacher, data.train, self.tokenizer, data.max_length)
            for plan in plans:
                self.cache.check_plan(activate(plan, resolve(self.teacher)), self.teacher)

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add what the block takes to the seconds of `stage`."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def score(self, student: PreTrainedModel) -> dict[str, Any]:
        """Fidelity on the held-out rows, the perplexity of a causal language model, and the metrics of a task."""
        self.progress("evaluate", 0, 1)
        with self.clock("evaluate"):
            scores: dict[str, Any] = {"fidelity": fidelity(student, self.teacher, self.data.held_out_batches)}
            if reads_blocks(student):
                scores["perplexity"] = perplexity(student, self.data.held_out_batches)
            if self.data.task is not None:
                scores["task"] = self.data.task.evaluate(student)
        self.progress("evaluate", 1, 1)
        return scores

    def measure(self, student: PreTrainedModel, student_bytes: int) -> dict[str, Any]:
        """Everything that `metrics.json` holds."""
        anatomy, pair = resolve(student), {"teacher": self.teacher, "student": student}
        counts = {side: parameter_counts(model, anatomy) for side, model in pair.items()}
        metrics: dict[str, Any] = {
            "params": {key: {side: counts[side][key] for side in pair} for key in ("total", "linears")},
            "bytes": {"teacher": stored_bytes(self.teacher), "student": student_bytes},
            "fidelity": {when: scores["fidelity"] for when, scores in self.scores.items()},
        }
        if self.shared_inputs:
            metrics["shared_inputs"] = self.shared_inputs
        with self.clock("evaluate"):
            if reads_blocks(student):
                found = {when: scores["perplexity"] for when, scores in self.scores.items()}
                metrics["perplexity"] = {"teacher": perplexity(self.teacher, self.data.held_out_batches), **found}
            if self.data.task is not None:
                found = {when: scores["task"] for when, scores in self.scores.items()}
                names = {"name": self.data.task.config.name, "teacher": self.data.task.evaluate(self.teacher)}
                metrics["task"] = {**names, **found}
            if self.recipe.evaluation.latency:
                metrics["latency_ms"] = self._latency(pair)
        metrics["seconds"] = {**self.seconds, "total": time.perf_counter() - self.started}
        metrics["tokens"] = {
            "calibration": count_tokens(self.data.calibration),
            "training": self.training_tokens,
            "evaluation": count_tokens(self.data.held_out_batches),
        }
        return metrics

    def _latency(self, pair: dict[str, PreTrainedModel]) -> dict[str, dict[str, float]]:
        self.progress("time forwards", 0, 2)
        found: dict[str, dict[str, float]] = {side: {} for side in pair}
        for done, batch in enumerate((1, 16), start=1):
            repeats = 15 if batch == 1 else 5
            for side, value in latency(pair, batch, self.recipe.evaluation.latency_tokens, repeats).items():
                found[side][f"batch{batch}"] = value
            self.progress("time forwards", done, 2)
        return found


def _start(
    teacher: str | PreTrainedModel,
    data: Data,
    recipe: Recipe | None,
    output: str | Path | None,
    tokenizer: str | PreTrainedTokenizerBase | None,
    overwrite: bool,
    resume: bool,
    on_progress: Progress | None,
) -> _Run:
    """Check what can be checked, load the teacher and the text: everything that can fail early does so here."""
    started = time.perf_counter()
    recipe = recipe or Recipe()
    folder = OutputFolder(Path(output or "runs"), overwrite=overwrite or output is None, resume=resume)
    device = recipe.find_device()
    set_seed(recipe.seed)
    words = take_tokenizer(tokenizer, _name(teacher))
    model = _model(teacher, recipe, device)
    for stage in recipe.trainings:
        activate(stage.plan, resolve(model))
    return _Run(
        teacher_name=_name(teacher),
        recipe=recipe,
        folder=folder,
        progress=on_progress or (lambda what, done, of: None),
        tokenizer_name=None if tokenizer is None else str(getattr(tokenizer, "name_or_path", tokenizer)),
        teacher=model,
        tokenizer=words,
        data=prepare(data, words, model, recipe),
        resume=resume,
        started=started,
    )


def _name(model: str | PreTrainedModel) -> str:
    return model if isinstance(model, str) else model.name_or_path or type(model).__name__


def _model(model: str | PreTrainedModel, recipe: Recipe, device: torch.device) -> PreTrainedModel:
    return take_model(model, recipe.head, check_dtype(recipe.dtype), device)


def _factorize(run: _Run, budget: Budget) -> PreTrainedModel:
    settings = run.recipe.factorize
    student = factorize(
        run.teacher,
        budget,
        solver=settings.solver,
        ranks=settings.ranks,
        calibration=run.data.calibration,
        rank_multiple=settings.rank_multiple,
        share_input=settings.share_input,
        vocabulary=settings.vocabulary,
        depth=settings.depth,
        on_progress=run.progress,
    )
    report: FactorizeReport = student.factorization  # type: ignore[assignment]
    run.seconds.update(report.seconds)
    run.shared_inputs = [{**asdict(group), "linears": [*group.linears]} for group in report.shared_inputs]
    return student


def _distill(run: _Run, student: PreTrainedModel) -> None:
    """Train `student` in place, one stage after the other."""
    stages = run.recipe.trainings
    for number, stage in enumerate(stages, start=1):
        if stage.training.steps != 0:
            checkpoints = run.folder.checkpoints
            _train(run, student, stage, checkpoints if len(stages) == 1 else checkpoints / f"stage_{number}")


def _train(run: _Run, student: PreTrainedModel, stage: Stage, checkpoints: Path) -> None:
    training = stage.training
    choose_trainable_(student, training.trainable)
    trainer = DistillTrainer(
        student,
        run.teacher,
        stage.plan,
        training.student_dropout,
        tokens_per_batch=training.find_tokens(row_lengths(run.data.train)),
        teacher_dtype=training.find_teacher_dtype(),
        cache=run.cache,
        args=training.to_arguments(checkpoints, run.recipe.seed, run.teacher.device.type == "cpu"),
        train_dataset=run.data.train,
        eval_dataset=run.data.held_out,
        data_collator=collator(run.tokenizer, run.teacher),
        callbacks=[ReportSteps(run.progress)],
    )
    trainer.remove_callback(PrinterCallback)  # prints log lines as dicts; ours go through logging
    for aspect, reason in trainer.plan.off.items():
        logger.info("aspect %s is off: %s", aspect, reason)
    with run.clock("distill"):
        run.training_tokens += train(trainer, checkpoints, run.resume)
    student.requires_grad_(True).eval()


def _finish(run: _Run, student: PreTrainedModel, result: Path, command: str, settings: dict[str, Any]) -> Report:
    """Write the student and everything that belongs to it into `result`; `command` made it of `settings`."""
    run.progress("save", 0, 1)
    student.save_pretrained(result)
    run.tokenizer.save_pretrained(result)
    copy_sentence_transformers_files(Path(run.teacher.name_or_path or ""), result)
    metrics = {**run.measure(student, bytes_on_disk(result)), "fingerprint": fingerprint(student)}
    environment = describe_environment(student.device, run.recipe.seed)
    names = {"teacher": run.teacher_name, "recipe": run.recipe, "tokenizer": run.tokenizer_name}
    data = {"data" if run.data.task is None else "task": run.data.config}
    write_recipe(result, {**names, **data, **settings, "output": run.folder.path})
    write_json(result / "metrics.json", metrics)
    write_json(result / "environment.json", environment)
    again = None if run.data.config is None else f"makd {command}"
    card = (run.teacher_name, type(student).__name__, metrics, environment, run.recipe.evaluation.latency_tokens, again)
    write_card(result, run.folder.path.name, *card)
    run.progress("save", 1, 1)
    return Report(run.folder.path, metrics)
