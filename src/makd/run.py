"""What the stages of one run share: the loaded teacher and text, and what is measured of the student on the way."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from makd.anatomy import resolve
from makd.aspects import activate
from makd.cache import TeacherCache
from makd.config import Recipe
from makd.data import count_tokens, reads_blocks
from makd.evaluation import fidelity, latency, parameter_counts, perplexity, stored_bytes
from makd.loading import check_dtype, take_model, take_tokenizer
from makd.preparation import Data, RunData, prepare
from makd.report import OutputFolder
from makd.sentence_encoder import encoder_of, origin_of

Progress = Callable[[str, int, int], None]
"""Called with (what is going on, how much is done, of how much)."""


@dataclass
class Run:
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
            scores: dict[str, Any] = {"fidelity": self._fidelity(student)}
            if reads_blocks(student):
                scores["perplexity"] = perplexity(student, self.data.held_out_batches)
            if self.data.task is not None:
                scores["task"] = self.data.task.evaluate(student)
        self.progress("evaluate", 1, 1)
        return scores

    def _fidelity(self, student: PreTrainedModel) -> dict[str, float]:
        return fidelity(student, self.teacher, self.data.held_out_batches, self.recipe.evaluation.pooling)

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


def start_run(
    teacher: str | PreTrainedModel,
    data: Data,
    recipe: Recipe | None,
    output: str | Path | None,
    tokenizer: str | PreTrainedTokenizerBase | None,
    overwrite: bool,
    resume: bool,
    on_progress: Progress | None,
) -> Run:
    """Check what can be checked, load the teacher and the text: everything that can fail early does so here."""
    started = time.perf_counter()
    recipe = recipe or Recipe()
    folder = OutputFolder(Path(output or "runs"), overwrite=overwrite or output is None, resume=resume)
    device = recipe.find_device()
    set_seed(recipe.seed)
    words = take_tokenizer(tokenizer, name_of(teacher))
    model = model_of(teacher, recipe, device)
    for stage in recipe.trainings:
        activate(stage.plan, resolve(model))
    if resolve(model).head is None:
        encoder_of(origin_of(model), recipe.evaluation.pooling)  # what cannot be measured is refused before the work
    return Run(
        teacher_name=name_of(teacher),
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


def name_of(model: str | PreTrainedModel) -> str:
    """What the recipe calls a model."""
    return model if isinstance(model, str) else model.name_or_path or type(model).__name__


def model_of(model: str | PreTrainedModel, recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """The model, loaded as the recipe says if it is a name."""
    return take_model(model, recipe.head, check_dtype(recipe.dtype), device)
