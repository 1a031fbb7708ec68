"""What the stages of one run share: the loaded teacher and text, and what is measured of the student on the way."""

import logging
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from makd.anatomy import check_predictions, resolve
from makd.aspects import activate
from makd.cache import TeacherCache, hash_teacher
from makd.capture import examine
from makd.config import Recipe
from makd.data import Batch, check_student_tokenizer, choose_tokenizer, count_tokens, reads_blocks
from makd.distill import (
    CHECKPOINT_SIZES,
    check_apart,
    check_same_everywhere,
    check_same_run,
    identify_run,
    warn_slow_bfloat16,
    with_start,
    write_identity,
)
from makd.errors import SettingError
from makd.evaluation import bytes_on_disk, fidelity, fingerprint, latency, parameter_counts, stored_bytes
from makd.evaluation.costs import timed_tokens
from makd.evaluation.held_out import fidelity_and_perplexities
from makd.evaluation.inside import look_inside
from makd.evaluation.samples import take_samples
from makd.factorization.factorize import check_dense
from makd.factorization.work import Work
from makd.forecasting import check_run, check_weights
from makd.loading import check_dtype, load_config, locate, modes_kept, take_model
from makd.preparation import Data, RunData, names_of, prepare
from makd.processes.first import in_first, in_turn, is_shared
from makd.processes.started import is_first
from makd.progress import OnProgress, Progress, nobody, track
from makd.random_state import keeping_random_state
from makd.ranks.budget import Budget
from makd.run_folder import (
    Findings,
    OutputFolder,
    noting_warnings,
    plain,
    token_counts,
    unmeasured_metrics,
    warn_changed_weights,
)
from makd.sentence_encoder import encoder_of, origin_of
from makd.source_names import name_of, tokenizer_name
from makd.start import identify_start
from makd.storage import find_save_dtype, stored_folder
from makd.student.hub import is_student

_COMPARED_OTHERWISE = ("plan", "training", "stages", "evaluation", "device", "cache")
"""Parts of a recipe that a run which resumes is not compared by as they stand there."""

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """What the stages of one run share. Of several processes each has its own; the first checks, measures and notes."""

    teacher_name: str
    recipe: Recipe
    folder: OutputFolder
    progress: OnProgress
    tokenizer_name: str | None
    """None when it came with the teacher."""
    teacher: PreTrainedModel
    teacher_bytes: int
    save_dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    data: RunData
    resume: bool
    started: float
    findings: Findings
    """For the run's report."""
    student_tokenizer: PreTrainedTokenizerBase | None = None
    """Its own, of a saved student that has one: saved with it again."""
    cache: TeacherCache | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    training_tokens: int = 0
    written_tokens: Counter[str] = field(default_factory=Counter)
    """`student`, `teacher` -> tokens of the completions that each wrote during the training."""
    lessons: dict[int, Mapping[str, float | int]] = field(default_factory=dict)
    """Layer -> what it learned before the model was taught as a whole."""
    identity: dict[str, Any] = field(default_factory=dict)
    """What a run that resumes is compared by; empty where no checkpoints are kept."""

    def open_cache(self) -> None:
        """Open the recipe's teacher cache, before any work that a stale one would make useless."""
        in_turn(self._open_cache)

    def _open_cache(self) -> None:
        plans = [stage.plan for stage in self.recipe.trainings if stage.training.steps != 0]
        if self.recipe.cache is not None and plans:
            where, data = self.recipe.cache, self.data
            self.cache = TeacherCache.open(where, self.teacher, data.train, self.tokenizer, data.max_length)
            for plan in plans:
                self.cache.check_plan(activate(plan, examine(self.teacher)), self.teacher)

    @in_first
    def identify(self, settings: Mapping[str, Any]) -> None:
        """Note what this run is of, and refuse to resume another one, before any work that it would make useless.

        Args:
            settings: that are not in the recipe, such as the budget.

        Raises:
            OutputError: the run to resume is another one; it names each difference.
        """
        trainings = self.recipe.trainings
        if not (self.resume or self.recipe.keeps_checkpoints):
            return
        few = {name: value for name, value in plain(self.recipe).items() if name not in _COMPARED_OTHERWISE}
        staged = {"stages": plain(trainings)} if len(trainings) > 1 else plain(trainings[0])
        device, cache = self.teacher.device.type, None if self.cache is None else self.cache.identity
        known = {**plain(settings), **few, **staged, "device": device, "cache": cache}
        self.identity = self.identify_as(known)
        if self.resume:
            check_same_run(self.folder.identity, self.identity)

    def identify_as(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """`identify_run` of this run's rows and models with some settings."""
        held_out = self.data.held_out if self.recipe.learns_by_evaluation else None
        return identify_run(settings, self.data.train, self.tokenizer, self.teacher, held_out)

    @in_first
    def note_start(self, student: PreTrainedModel) -> None:
        """Training starts from `student`: compare it with that of the run to resume, or note it for one that will.

        Raises:
            OutputError: the run to resume started from another one.
        """
        if not self.identity:
            return
        whole = with_start(self.identity, student)
        if self.resume:
            check_same_run(self.folder.identity, whole)
        else:
            write_identity(self.folder.identity, whole)

    def start_work(self, budget: Budget) -> Work:
        """Where the factorization keeps what is done: beside the output, until the run is done."""

        def identify() -> dict[str, Any]:
            known = {"teacher's weights": hash_teacher(self.teacher), "device": self.teacher.device.type}
            config = {"model_type": self.teacher.config.model_type}
            return identify_start(known, config, budget, self.recipe, self.data.calibration)

        return Work(self.folder.factorization, identify, anew=self.folder.overwrite)

    @in_first
    def check_fits(self, budget: Budget, *, trains: bool) -> None:
        """Refuse to make a student that this machine has no room for, and to train it, if it `trains`.

        Raises:
            SettingError: the teacher is a student.
            RoomError: more memory or disk is needed than there is.
        """
        check_dense(self.teacher)
        check_run(
            self.teacher, self.data, budget, self.recipe, self.folder.path, self.save_dtype,
            self.folder.factorization_bytes, trains=trains,
        )  # fmt: skip

    @in_first
    def check_room(self, student: PreTrainedModel) -> None:
        """Refuse to train what the disk has no room for, with its checkpoints.

        Raises:
            OutputError: the disk has less room than training and checkpoints take.
        """
        keeps = self.recipe.keeps_checkpoints and not self.resume
        self.folder.check_room(stored_bytes(student) * (1 + (CHECKPOINT_SIZES if keeps else 0)))

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add what the block takes to the seconds of `stage`."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    @in_first
    def score(self, student: PreTrainedModel) -> dict[str, Any]:
        """Fidelity on the held-out rows, the perplexity of a language model, and the metrics of a task."""
        with self.clock("evaluate"):
            scores = self._compare(student)
            if self.data.task is not None:
                scores["task"] = self.data.task.evaluate(student, self.recipe.evaluation.batch_size, self.progress)
        return scores

    @property
    def _held_out(self) -> Iterator[Batch]:
        """The held-out batches, with word of each."""
        return track(self.data.held_out_batches, "evaluate", self.progress)

    @in_first
    def look_inside(self, when: str, student: PreTrainedModel) -> None:
        """Note where inside `student` its error is, for the report: `before` or `after` the training."""
        with self.clock("report"):
            self.findings.inside[when] = look_inside(student, self.teacher, self.data.held_out_batches)

    def take_samples(self, student: PreTrainedModel) -> None:
        """Note what both models make of a few held-out texts, for the report."""
        few = self.recipe.evaluation.samples
        with self.clock("report"):
            self.findings.samples = take_samples(
                student, self.teacher, self.tokenizer, self.data.held_out, few, self.recipe.evaluation.pooling
            )

    def _compare(self, student: PreTrainedModel) -> dict[str, Any]:
        """What the held-out rows say without labels; perplexities of student and teacher both."""
        # all that an encoder-decoder's decoder writes is a completion
        only = self.data.has_completions and reads_blocks(student)
        tokens: Literal["all", "completion"] = "completion" if only else "all"
        asked = (student, self.teacher, self._held_out, self.recipe.evaluation.pooling, tokens)
        if not self.data.predicts_text(student):
            return {"fidelity": fidelity(*asked)}
        found, perplexities = fidelity_and_perplexities(*asked)
        return {"fidelity": found, "perplexity": perplexities, **self._rolling(student)}

    def _rolling(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """Perplexity of the held-out texts as one, if the recipe asks for it."""
        text = self.data.long_text
        if text is None:
            return {}
        found = text.perplexity(model, self.tokenizer, self.recipe.evaluation.batch_size)
        return {"rolling_perplexity": found.scores}

    def measure(self, student: PreTrainedModel, student_bytes: int) -> dict[str, Any]:
        """Everything that `metrics.json` holds."""
        pair, made = {"teacher": self.teacher, "student": student}, self.findings.made
        counts = {side: parameter_counts(model, resolve(model)) for side, model in pair.items()}
        stored = {"teacher": self.teacher_bytes, "student": student_bytes}
        metrics = unmeasured_metrics(counts, stored, made, self.lessons)
        metrics["fidelity"] = {when: scores["fidelity"] for when, scores in self.scores.items()}
        with self.clock("evaluate"):
            if self.data.predicts_text(student):
                sides = {when: scores["perplexity"] for when, scores in self.scores.items()}
                teachers = next(iter(sides.values()))["teacher"]
                found = {when: both["student"] for when, both in sides.items()}
                metrics["perplexity"] = {"teacher": teachers, **found}
                for name, value in self._rolling(self.teacher).items():
                    metrics[name] = {"teacher": value, **{when: side[name] for when, side in self.scores.items()}}
            if self.data.task is not None:
                found = {when: scores["task"] for when, scores in self.scores.items()}
                names = {
                    "name": self.data.task.config.name,
                    "splits": list(self.data.task.evaluation),
                    "teacher": self.data.task.evaluate(self.teacher, self.recipe.evaluation.batch_size, self.progress),
                }
                metrics["task"] = {**names, **found}
            if self.recipe.evaluation.latency:
                metrics["latency_ms"], metrics["latency_tokens"] = self._latency(pair)
        metrics["seconds"] = {**self.seconds, "total": time.perf_counter() - self.started}
        metrics["tokens"] = token_counts(
            made, self.lessons, training=self.training_tokens, written=self.written_tokens,
            evaluation=count_tokens(self.data.held_out_batches),
        )  # fmt: skip
        metrics["measured_on"] = self.data.measured_on
        return metrics

    def _latency(self, pair: dict[str, PreTrainedModel]) -> tuple[dict[str, dict[str, float]], int]:
        """Milliseconds of a forward by side and batch, and the tokens of a row."""
        asked = self.recipe.evaluation.latency_tokens
        tokens = timed_tokens(pair.values(), asked)
        if tokens < asked:
            logger.info(
                "forwards of %d tokens are timed: the models have no positions for evaluation.latency_tokens = %d",
                tokens, asked,
            )  # fmt: skip
        self.progress(Progress("time forwards", 0, 2, "shapes"))
        found: dict[str, dict[str, float]] = {side: {} for side in pair}
        for done, batch in enumerate((1, 16), start=1):
            repeats = 15 if batch == 1 else 5
            for side, value in latency(pair, batch, tokens, repeats).items():
                found[side][f"batch{batch}"] = value
            self.progress(Progress("time forwards", done, 2, "shapes"))
        return found, tokens


@contextmanager
def start_run(
    teacher: str | PreTrainedModel,
    data: Data,
    recipe: Recipe | None,
    output: str | Path | None,
    tokenizer: str | PreTrainedTokenizerBase | None,
    overwrite: bool,
    resume: bool,
    on_progress: OnProgress | None,
    student: str | PreTrainedModel | None = None,
    kinds: Collection[str] = ("checkpoints",),
) -> Iterator[Run]:
    """Check what can be checked, load the teacher and the text: everything that can fail early does so here.

    While the block runs, the output is this run's alone; after it, random numbers go on as they would have without it,
    and models in hand have the modes that they had. `student` is a saved one that it reads besides; `kinds` is the
    unfinished work that it may go on with. Of several processes the first loads before the others.
    """
    started = time.perf_counter()
    recipe = recipe or Recipe()
    models = [model for model in (teacher, student) if model is not None]
    named = [recipe.cache, *names_of(data), tokenizer_name(tokenizer), *map(name_of, models)]
    folder = OutputFolder(Path(output or "runs"), overwrite=overwrite, resume=resume, inputs=named, kinds=kinds)
    opened = nullcontext() if output is None else folder
    with keeping_random_state(), modes_kept(*models), opened, noting_warnings() as warnings:
        progress = on_progress if is_first() else None
        findings = Findings(warnings, origin=Path(student) if isinstance(student, str) else None)
        run = in_turn(lambda: _load(teacher, data, recipe, folder, tokenizer, progress, started, findings, student))
        if is_shared():
            check_same_everywhere(run.identify_as(plain(recipe)))
        yield run


def _load(
    teacher: str | PreTrainedModel,
    data: Data,
    recipe: Recipe,
    folder: OutputFolder,
    tokenizer: str | PreTrainedTokenizerBase | None,
    on_progress: OnProgress | None,
    started: float,
    findings: Findings,
    student: str | PreTrainedModel | None,
) -> Run:
    device, tell = recipe.find_device(), on_progress or nobody
    if recipe.uses_bfloat16:
        warn_slow_bfloat16(device)
    tell(Progress("load", 0, 2))
    if isinstance(student, str) and locate(student).gguf_file is None:
        load_config(student)  # one that is not there is told before teacher and text are read
        warn_changed_weights(Path(locate(student).folder))
    set_seed(recipe.seed)
    words = choose_tokenizer(tokenizer, teacher)
    student_tokenizer = None if student is None else check_student_tokenizer(student, words)
    if isinstance(teacher, str):
        check_weights(teacher, recipe)
    model = model_of(teacher, recipe, device)
    tell(Progress("load", 1, 2))
    check_predictions(model)
    for stage in recipe.trainings:
        activate(stage.plan, examine(model))
    if resolve(model).head is None:
        encoder_of(origin_of(model), recipe.evaluation.pooling)  # what cannot be measured is refused before the work
    text = prepare(data, words, model, recipe)
    tell(Progress("load", 2, 2))
    return Run(
        teacher_name=name_of(teacher),
        recipe=recipe,
        folder=folder,
        progress=tell,
        tokenizer_name=tokenizer_name(tokenizer),
        teacher=model,
        teacher_bytes=bytes_of(teacher, model),
        save_dtype=find_save_dtype(recipe.save_dtype, teacher, check_dtype(recipe.dtype)),
        tokenizer=words,
        data=text,
        resume=folder.resume,
        started=started,
        findings=findings,
        student_tokenizer=student_tokenizer,
    )


def model_of(model: str | PreTrainedModel, recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """The model, loaded as the recipe says if it is a name."""
    return take_model(model, recipe.head, check_dtype(recipe.dtype), device)


def check_is_another(student: PreTrainedModel, teacher: PreTrainedModel, called: str) -> None:
    """Refuse a student, `called` so, that is its teacher, has the same weights, or shares some that learn."""
    if not is_student(student) and fingerprint(student) == fingerprint(teacher):
        raise SettingError(
            f"The student, {called}, is the teacher: there is nothing to learn. Give a student that makd made (`makd "
            "factorize`), or another model."
        )
    check_apart(student, teacher)


def bytes_of(source: str | PreTrainedModel, model: PreTrainedModel) -> int:
    """Bytes of the weights of `model` on disk; of one in hand, or of a GGUF, if it were saved as it is."""
    folder = stored_folder(source) if isinstance(source, str) else None
    return stored_bytes(model) if folder is None else bytes_on_disk(folder)
