"""The commands that run the pipeline: the flags of each are the parameters of a function below.

Tells what was measured. Imported when one of them is asked for: what stands here needs torch.
"""

import logging
from collections.abc import Sequence

from makd import pipeline, streaming
from makd.cli.outcome import Outcome, after_student
from makd.cli.tasks import task_or_data
from makd.cli.terminal import seconds_line
from makd.config import Recipe
from makd.data import DataConfig
from makd.efforts import describe_effort
from makd.evaluation import InstructionsConfig
from makd.forecasting import RunForecast, forecast, forecast_table
from makd.progress import OnProgress
from makd.ranks.budget import Budget
from makd.run_folder import metrics_table
from makd.shell import command_on_pair
from makd.solvers import SOLVERS
from makd.tasks import TaskConfig

logger = logging.getLogger(__name__)


def compress(
    on_progress: OnProgress,
    teacher: str,
    budget: Budget,
    output: str,
    data: DataConfig = DataConfig(),  # noqa: B008 - frozen
    task: TaskConfig | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    tokenizer: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    effort: str | None = None,
) -> Outcome:
    """Make a student, teach it, measure it, save it.

    Args:
        on_progress: called with a `Progress` after each unit of work.
        teacher: hub id, folder, .gguf file, or package:module/path.
        budget: how many parameters the student may have; exactly one of params, keep, keep_linears.
        output: folder for the student.
        data: text to calibrate, train and evaluate on.
        task: a task instead of text; `--task NAME --task_data PATH` for short.
        recipe: how the student is made.
        tokenizer: where the tokenizer is, if not with the teacher.
        overwrite: replace the output folder when all is done.
        resume: go on from the last checkpoint of a run that was stopped.
        dry_run: print what would be made, and the memory, disk and time that it takes; nothing is done.
        effort: how much work it is worth: quick, normal or best; what else is set wins.
    """
    if effort is not None:
        logger.info("%s", describe_effort(effort, recipe))
    chosen = task_or_data(data, task, teacher)
    if dry_run:
        return _foreseen(forecast(teacher, chosen, budget, recipe, output, tokenizer=tokenizer))
    report = pipeline.compress(
        teacher, chosen, budget, recipe, output,
        tokenizer=tokenizer, overwrite=overwrite, resume=resume, on_progress=on_progress,
    )  # fmt: skip
    return _made(report, teacher, after_student(report.folder, teacher, tokenizer, recipe.head, report.metrics))


def factorize(
    on_progress: OnProgress,
    teacher: str,
    budget: Budget,
    output: str,
    data: DataConfig = DataConfig(),  # noqa: B008 - frozen
    task: TaskConfig | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    tokenizer: str | None = None,
    overwrite: bool = False,
    stream: bool = False,
    dry_run: bool = False,
) -> Outcome:
    """Make a student without training it, measure it, save it.

    Args:
        on_progress: called with a `Progress` after each unit of work.
        teacher: hub id, folder, .gguf file, or package:module/path.
        budget: how many parameters the student may have; exactly one of params, keep, keep_linears.
        output: folder for the student.
        data: text to calibrate and evaluate on.
        task: a task instead of text; `--task NAME --task_data PATH` for short.
        recipe: how the student is made.
        tokenizer: where the tokenizer is, if not with the teacher.
        overwrite: replace the output folder when all is done.
        stream: from files to files, for teachers larger than memory; the student is not compared with its teacher.
        dry_run: print what would be made, and the memory, disk and time that it takes; nothing is done.
    """
    without = stream and recipe.layer_teacher is None and not _looks_at_text(recipe.factorize.solver)
    chosen = data if without and task is None else task_or_data(data, task, teacher)
    if dry_run:
        return _foreseen(
            forecast(teacher, chosen, budget, recipe, output, tokenizer=tokenizer, command="factorize", stream=stream)
        )
    make = streaming.factorize_streamed if stream else pipeline.factorize_only
    report = make(
        teacher, chosen, budget, recipe, output, tokenizer=tokenizer, overwrite=overwrite, on_progress=on_progress
    )
    taught = command_on_pair(
        "distill", report.folder, teacher, tokenizer, recipe.head, output=f"{report.folder}-taught"
    )
    others = after_student(report.folder, teacher, tokenizer, recipe.head, report.metrics)
    return _made(report, teacher, [f"{taught}   # teach it", *others])


def _looks_at_text(solver: str) -> bool:
    return solver == "auto" or SOLVERS[solver].needs_text


def _foreseen(found: RunForecast) -> Outcome:
    content = {"student": found.student, "training": found.training, "available": found.available}
    return Outcome({**content, "seconds": found.seconds}, [forecast_table(found)], check=found.check)


def _made(report: pipeline.Report, source: str, after: Sequence[str]) -> Outcome:
    """A student that was made of `source`."""
    shown = [metrics_table(report.metrics, f"{source} -> {report.folder}"), seconds_line(report.metrics)]
    return Outcome({"folder": report.folder, "metrics": report.metrics}, shown, after)


def distill(
    on_progress: OnProgress,
    student: str,
    teacher: str,
    output: str,
    data: DataConfig = DataConfig(),  # noqa: B008 - frozen
    task: TaskConfig | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    tokenizer: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Outcome:
    """Teach a saved student (further).

    Args:
        on_progress: called with a `Progress` after each unit of work.
        student: folder of a student.
        teacher: hub id, folder, .gguf file, or package:module/path.
        output: folder for the taught student.
        data: text to train and evaluate on.
        task: a task instead of text; `--task NAME --task_data PATH` for short.
        recipe: how the student is taught.
        tokenizer: where the tokenizer is, if not with the teacher.
        overwrite: replace the output folder when all is done.
        resume: go on from the last checkpoint of a run that was stopped.
    """
    report = pipeline.distill(
        student, teacher, task_or_data(data, task, student), recipe, output,
        tokenizer=tokenizer, overwrite=overwrite, resume=resume, on_progress=on_progress,
    )  # fmt: skip
    return _made(report, student, after_student(report.folder, teacher, tokenizer, recipe.head, report.metrics))


def evaluate(
    on_progress: OnProgress,
    student: str,
    teacher: str,
    data: DataConfig = DataConfig(),  # noqa: B008 - frozen
    task: TaskConfig | None = None,
    instructions: InstructionsConfig | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    tokenizer: str | None = None,
) -> Outcome:
    """Measure a saved student against its teacher on held-out text.

    Args:
        on_progress: called with a `Progress` after each unit of work.
        student: folder of a student.
        teacher: hub id, folder, .gguf file, or package:module/path.
        data: text to evaluate on; without it, the text that the student was made with.
        task: a task instead of text; `--task NAME --task_data PATH` for short.
        instructions: prompts with references that both answer, for ROUGE-L; `--instructions PATH` for short.
        recipe: its evaluation part says what is measured.
        tokenizer: where the tokenizer is, if not with the teacher.
    """
    metrics = pipeline.evaluate(
        student, teacher, task_or_data(data, task, student), recipe,
        instructions=instructions, tokenizer=tokenizer, on_progress=on_progress,
    )  # fmt: skip
    return Outcome(metrics, [metrics_table(metrics, f"{student} against {teacher}"), seconds_line(metrics)])
