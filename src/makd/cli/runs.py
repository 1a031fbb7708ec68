"""The commands that run the pipeline: the flags of each are the parameters of a function below.

Prints what was measured. Imported when one of them is asked for: what stands here needs torch.
"""

from makd import pipeline, streaming
from makd.cli.tasks import task_or_data
from makd.cli.terminal import print_metrics, print_table, progress_bars
from makd.config import Recipe
from makd.data import DataConfig
from makd.evaluation import InstructionsConfig
from makd.forecasting import RunForecast, forecast, forecast_table
from makd.ranks.budget import Budget
from makd.report import OutputFile
from makd.tasks import TaskConfig


def compress(
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
) -> None:
    """Make a student, teach it, measure it, save it.

    Args:
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
    """
    chosen = task_or_data(data, task)
    if dry_run:
        _print_forecast(forecast(teacher, chosen, budget, recipe, output, tokenizer=tokenizer))
        return
    with progress_bars() as progress:
        report = pipeline.compress(
            teacher, chosen, budget, recipe, output,
            tokenizer=tokenizer, overwrite=overwrite, resume=resume, on_progress=progress,
        )  # fmt: skip
    print_metrics(report.metrics, f"{teacher} -> {report.folder}")


def factorize(
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
) -> None:
    """Make a student without training it, measure it, save it.

    Args:
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
    chosen = task_or_data(data, task)
    if dry_run:
        _print_forecast(
            forecast(teacher, chosen, budget, recipe, output, tokenizer=tokenizer, command="factorize", stream=stream)
        )
        return
    make = streaming.factorize_streamed if stream else pipeline.factorize_only
    with progress_bars() as progress:
        report = make(
            teacher, chosen, budget, recipe, output,
            tokenizer=tokenizer, overwrite=overwrite, on_progress=progress,
        )  # fmt: skip
    print_metrics(report.metrics, f"{teacher} -> {report.folder}")


def _print_forecast(found: RunForecast) -> None:
    print_table(forecast_table(found))
    found.check()


def distill(
    student: str,
    teacher: str,
    output: str,
    data: DataConfig = DataConfig(),  # noqa: B008 - frozen
    task: TaskConfig | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    tokenizer: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> None:
    """Teach a saved student (further).

    Args:
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
    with progress_bars() as progress:
        report = pipeline.distill(
            student, teacher, task_or_data(data, task), recipe, output,
            tokenizer=tokenizer, overwrite=overwrite, resume=resume, on_progress=progress,
        )  # fmt: skip
    print_metrics(report.metrics, f"{student} -> {report.folder}")


def evaluate(
    student: str,
    teacher: str,
    data: DataConfig | None = None,
    task: TaskConfig | None = None,
    instructions: InstructionsConfig | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    tokenizer: str | None = None,
    json: str | None = None,
    overwrite: bool = False,
) -> None:
    """Measure a saved student against its teacher on held-out text.

    Args:
        student: folder of a student.
        teacher: hub id, folder, .gguf file, or package:module/path.
        data: text to evaluate on; without it, the text that the student was made with.
        task: a task instead of text; `--task NAME --task_data PATH` for short.
        instructions: prompts with references that both answer, for ROUGE-L; `--instructions PATH` for short.
        recipe: its evaluation part says what is measured.
        tokenizer: where the tokenizer is, if not with the teacher.
        json: file to write the measurements to.
        overwrite: replace that file.
    """
    file = None if json is None else OutputFile(json, overwrite)
    chosen = pipeline.data_of(student) if data is None and task is None else task_or_data(data, task)
    with progress_bars() as progress:
        metrics = pipeline.evaluate(
            student, teacher, chosen, recipe,
            instructions=instructions, tokenizer=tokenizer, on_progress=progress,
        )  # fmt: skip
    print_metrics(metrics, f"{student} against {teacher}")
    if file is not None:
        file.write(metrics)
