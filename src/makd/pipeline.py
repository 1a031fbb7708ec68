"""The whole method on one page. Read this first; the folders are its stations, in this order.

Where a run has several processes (torchrun, accelerate launch), each goes through all of this. What is `in_first` the
first one does, and all go on with what it returns; what is done `in_turn` each does, after the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from makd.anatomy.limits import token_limit
from makd.capture import examine
from makd.config import Recipe, Stage
from makd.data import DataConfig, collator, log_prompts_seen, no_text, read_settings
from makd.distill import (
    AT_THE_END,
    DistillTrainer,
    LayerTeacher,
    ReportSteps,
    check_stage,
    check_teachable,
    float32_weights,
    in_pieces,
    learning,
    teach_layers_,
    teaching_in_pieces,
    train,
    training_lengths,
)
from makd.errors import DataError
from makd.evaluation import InstructionsConfig, bytes_on_disk, fingerprint
from makd.evaluation.answers import compare_answers, open_instructions
from makd.evaluation.prompts import encode_prompts, warn_asked_otherwise
from makd.factorization.factorize import make_student
from makd.generation import stop_tokens
from makd.kinds import takes
from makd.loading import check_dtype, locate
from makd.plain_yaml import read_yaml
from makd.preparation import NO_LABELS, Data
from makd.processes.first import in_first, in_turn
from makd.progress import OnProgress, Progress
from makd.ranks.budget import Budget
from makd.registry import make_settings
from makd.run import Run, bytes_of, check_is_another, model_of, start_run
from makd.run_folder import (
    describe_environment,
    warn_worsened,
    write_card,
    write_json,
    write_recipe,
)
from makd.sentence_encoder import copy_companions, origin_of
from makd.source_names import name_of
from makd.start import start_settings
from makd.storage import find_save_dtype
from makd.student.counting import count_parameters
from makd.student.hub import is_student, mark_student
from makd.tasks import TaskConfig
from makd.weights.sound import check_finite, round_weights_, stored_in


@dataclass(frozen=True)
class Report:
    """What a run found, and where the student is."""

    folder: Path
    metrics: dict[str, Any]
    """The content of `metrics.json`."""
    is_student: bool
    """Whether the model that was saved has low-rank factors, or does without some layers: no student is made of it."""


@takes
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
    on_progress: OnProgress | None = None,
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
            A factorization whose states were kept on disk goes on unasked, at the layer where it was.
        on_progress: called with a `Progress` after each unit of work, for progress bars.

    Returns:
        The measurements, and where the student is.

    Raises:
        MakdError: with what was wrong, which value, and what is allowed. Nothing that was on disk is lost.
    """
    kinds, recipe = ("checkpoints", "factorization"), recipe or Recipe()
    recipe.check_launch()
    with start_run(teacher, data, recipe, output, tokenizer, overwrite, resume, on_progress, kinds=kinds) as run:
        run.check_fits(budget, trains=True)
        run.open_cache()
        run.identify({"command": "compress", "budget": budget})
        _check_layers(run)
        _check_trainings(run, run.teacher)
        student = _factorize(run, budget, trains=True)
        run.scores["before"] = run.score(student)
        run.look_inside("before", student)
        with run.folder.work() as result:
            _distill(run, student)
            return _finish(run, student, result, "compress", {"budget": budget})


@takes
@in_first
def factorize_only(
    teacher: str | PreTrainedModel,
    data: Data,
    budget: Budget,
    recipe: Recipe | None = None,
    output: str | Path = "runs/student",
    *,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
) -> Report:
    """Make a student and measure it, without the training. Arguments and errors are those of `compress`."""
    kinds = ("factorization",)
    with start_run(teacher, data, recipe, output, tokenizer, overwrite, False, on_progress, kinds=kinds) as run:
        run.check_fits(budget, trains=False)
        _check_layers(run)
        student = _factorize(run, budget, trains=False)
        with run.folder.work() as result:
            return _finish(run, student, result, "factorize", {"budget": budget})


@takes
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
    on_progress: OnProgress | None = None,
) -> Report:
    """Teach a saved `student` (further). Arguments and errors are those of `compress`."""
    recipe = recipe or Recipe()
    recipe.check_launch()
    with start_run(teacher, data, recipe, output, tokenizer, overwrite, resume, on_progress, student) as run:
        run.open_cache()
        run.identify({"command": "distill"})
        _check_layers(run)
        run.save_dtype = find_save_dtype(run.recipe.save_dtype, student, check_dtype(run.recipe.dtype))
        model = in_turn(lambda: model_of(student, run.recipe, run.teacher.device))
        check_is_another(model, run.teacher, name_of(student))
        _check_trainings(run, model)
        run.scores["before"] = run.score(model)
        run.look_inside("before", model)
        with run.folder.work() as result:
            if run.recipe.layer_teacher is not None:
                model = _teach_layers(run, model, run.recipe.layer_teacher)
            _distill(run, model)
            return _finish(run, model, result, "distill", {"student": name_of(student)})


@takes
@in_first
def evaluate(
    student: str | PreTrainedModel,
    teacher: str | PreTrainedModel,
    data: Data,
    recipe: Recipe | None = None,
    *,
    instructions: InstructionsConfig | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Measure a saved `student` against `teacher` on held-out text: what `metrics.json` holds, without the training.

    Args:
        student: as for `distill`.
        teacher: as for `compress`.
        data: whose held-out part is measured on; `compress` says what it may be.
        recipe: the evaluation's settings, the head and the dtype are looked at; None takes the defaults.
        instructions: both answer them besides, and ROUGE-L is measured of what they answer.
        tokenizer: where the tokenizer is, if not with the teacher; or a tokenizer.
        on_progress: called with a `Progress` after each unit of work, for progress bars.

    Raises:
        MakdError: with what was wrong, which value, and what is allowed.
    """
    asked = None if instructions is None else open_instructions(instructions)
    with start_run(teacher, data, recipe, None, tokenizer, False, False, on_progress, student) as run:
        prompts = None if asked is None else encode_prompts(asked, run.tokenizer, run.teacher)
        if asked is not None and run.data.texts is not None:
            log_prompts_seen(run.data.texts, asked.messages, asked.config.path)
        if asked is not None and run.data.has_completions and isinstance(run.data.config, DataConfig):
            warn_asked_otherwise(asked.config, run.data.config, run.teacher)
        model = model_of(student, run.recipe, run.teacher.device)
        run.scores["after"] = run.score(model)
        answers: dict[str, Any] = {}
        if prompts is not None:
            with run.clock("answer"):
                answers["instructions"] = compare_answers(model, run.teacher, run.tokenizer, prompts, run.progress)
        return {**run.measure(model, bytes_of(student, model)), **answers}


@takes
def data_of(student: str) -> DataConfig | TaskConfig:
    """The data or task that a saved model was made with, as its `recipe.yaml` says: a student, or a task's teacher.

    Raises:
        DataError: it has no recipe; or was made with a list of texts, which the recipe does not hold.
        UnknownNameError: the recipe has a setting that there is not.
    """
    folder = Path(locate(student).folder)
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        where = f"{student} does not say" if folder.is_dir() else f"there is no folder {student} that says"
        raise no_text(f"No text was given, and {where} which it was made with")
    written = read_yaml(recipe)
    if not isinstance(written, dict) or not isinstance(written.get("task") or written.get("data", 0), dict | None):
        raise DataError(f"{recipe} is no recipe that makd wrote: it names no data. Give --data.path or --task.")
    if written.get("task") is not None:
        return make_settings(TaskConfig, "setting of a task", written["task"])
    settings = written.get("data")
    if settings is None:
        raise DataError(f"{student} was made with texts in hand, not kept in its recipe.yaml. Give --data.path.")
    return read_settings(settings)


@in_first
def _factorize(run: Run, budget: Budget, *, trains: bool) -> PreTrainedModel:
    student, report = make_student(
        run.teacher, budget, start_settings(run.recipe, trains=trains), run.data.calibration,
        run.recipe.layer_teacher, run.progress, run.start_work(budget),
    )  # fmt: skip
    run.findings.made = report
    run.seconds.update(report.seconds)
    run.lessons = dict(report.lessons)
    return student


@in_first
def _check_layers(run: Run) -> None:
    """Refuse, before any work, to teach layers one by one that cannot be run so, if they are to be taught."""
    if run.recipe.layer_teacher is not None:
        check_teachable(examine(run.teacher), run.data.calibration)


@in_first
def _check_trainings(run: Run, student: PreTrainedModel) -> None:
    """Refuse a stage whose plan `student`, or what is made of it, cannot learn from the run's rows."""
    for stage in run.recipe.trainings:
        if stage.training.steps != 0:
            cached = run.cache is not None
            check_stage(stage.plan, stage.training, student, run.teacher, run.data.train, cached=cached)


@in_first
def _teach_layers(run: Run, student: PreTrainedModel, teacher: LayerTeacher) -> PreTrainedModel:
    """Teach a finished `student` layer by layer, in place."""
    with run.clock("layerwise"):
        run.lessons = teach_layers_(
            student, run.teacher, teacher.plan, run.data.calibration, teacher.settings, teacher.seed,
            run.recipe.factorize.store, run.progress,
        )  # fmt: skip
    return student


def _distill(run: Run, student: PreTrainedModel) -> None:
    """Train `student` in place, one stage after the other."""
    run.note_start(student)
    run.check_room(student)
    stages = _keeping_ends(run.recipe.trainings)
    with float32_weights(student):
        for number, stage in enumerate(stages, start=1):
            if stage.training.steps != 0:
                checkpoints = run.folder.checkpoints if len(stages) == 1 else run.folder.checkpoints / f"stage_{number}"
                _train(run, student, stage, number, checkpoints)


def _keeping_ends(stages: Sequence[Stage]) -> list[Stage]:
    """The stages; one that keeps no checkpoints keeps its end for a later one that does, which goes on from there."""
    found = list(stages)
    for place, stage in enumerate(stages):
        if stage.training.save_every is None and any(later.training.save_every for later in stages[place + 1 :]):
            found[place] = replace(stage, training=replace(stage.training, save_every=AT_THE_END))
    return found


def _train(run: Run, student: PreTrainedModel, stage: Stage, number: int, checkpoints: Path) -> None:
    training = stage.training.with_products_in(check_dtype(run.recipe.dtype))
    lengths = training_lengths(run.data.train, stage.plan.writers, token_limit(student))
    with (
        learning(student, training, run.recipe.seed, number),
        in_pieces(student) as learner,
        teaching_in_pieces(run.teacher, training.shard_teacher) as teacher,
    ):
        trainer = DistillTrainer(
            learner,
            teacher,
            stage.plan,
            training.student_dropout,
            tokens_per_batch=training.find_tokens(lengths),
            teacher_dtype=training.find_teacher_dtype(),
            cache=run.cache,
            shard_teacher=training.shard_teacher,
            stops=stop_tokens(run.teacher, run.tokenizer) if stage.plan.writers.written else (),
            args=training.to_arguments(checkpoints, run.recipe.seed, run.teacher.device.type == "cpu"),
            train_dataset=run.data.train,
            eval_dataset=run.data.held_out,
            data_collator=collator(run.tokenizer, run.teacher),
            callbacks=[ReportSteps(run.progress)],
        )
        trainer.remove_callback(PrinterCallback)  # prints log lines as dicts; ours go through logging
        with run.clock("distill"):
            run.training_tokens += train(trainer, checkpoints, run.resume)
            if trainer.rollouts is not None:
                run.written_tokens.update(trainer.rollouts.tokens)  # a Counter adds
        active = {item.name: item.term for item in trainer.plan.terms}
        idle = {} if run.data.has_labels else {one.aspect: NO_LABELS for one in active.values() if one.aspect == "task"}
        weights = {name: term.weight for name, term in active.items() if term.aspect not in idle}
        run.findings.note_training(weights, {**trainer.plan.off, **idle}, trainer.state.log_history)
    student.eval()


@in_first
def _finish(run: Run, student: PreTrainedModel, result: Path, command: str, settings: dict[str, Any]) -> Report:
    """Measure the student as it is saved, and write it with what belongs to it; `command` made it of `settings`."""
    round_weights_(student, run.save_dtype)
    check_finite(student, "The student")
    run.scores["after"] = run.score(student)
    run.look_inside("after", student)
    run.take_samples(student)
    run.progress(Progress("save", 0, 1))
    mark_student(student)
    with stored_in(student, run.save_dtype):
        student.save_pretrained(result)
    (run.student_tokenizer or run.tokenizer).save_pretrained(result)
    copy_companions(origin_of(run.teacher), result)
    run.progress(Progress("save", 1, 1))
    metrics = {**run.measure(student, bytes_on_disk(result)), "fingerprint": fingerprint(student)}
    if metrics["tokens"]["training"]:
        warn_worsened(metrics)
    environment = describe_environment(student.device, run.recipe.seed)
    names = {"teacher": run.teacher_name, "recipe": run.recipe, "tokenizer": run.tokenizer_name}
    data = {"data" if run.data.task is None else "task": run.data.config}
    write_recipe(result, {**names, **data, **settings, "output": run.folder.path})
    write_json(result / "metrics.json", metrics)
    write_json(result / "environment.json", environment)
    run.findings.write(result, student)
    card = (run.teacher_name, type(student).__name__, metrics, environment, command, run.data.config)
    others: Literal["shallow", "dense"] = "shallow" if is_student(student) else "dense"
    kind = "factored" if count_parameters(student)["factored"] else others
    write_card(result, run.folder.path.name, *card, kind=kind)
    return Report(run.folder.path, metrics, is_student(student))
