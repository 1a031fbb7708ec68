"""The command `makd finetune`: a model is taught a task from its labels."""

from makd import finetuning
from makd.cli.outcome import Outcome
from makd.cli.terminal import seconds_line
from makd.config import FinetuneRecipe
from makd.pipeline import Report
from makd.progress import OnProgress
from makd.run_folder import scores_table
from makd.shell import command, command_on_pair
from makd.tasks import TaskConfig


def finetune(
    on_progress: OnProgress,
    model: str,
    task: TaskConfig,
    output: str,
    recipe: FinetuneRecipe = FinetuneRecipe(),  # noqa: B008 - frozen
    tokenizer: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Outcome:
    """Teach a model, or a student, a task from its labels.

    Args:
        on_progress: called with a `Progress` after each unit of work.
        model: hub id, folder, or package:module/path.
        task: what it is taught; `--task NAME --task_data PATH` for short.
        output: folder for the taught model.
        recipe: how it is taught.
        tokenizer: where the tokenizer is, if not with the model.
        overwrite: replace the output folder when all is done.
        resume: go on from the last checkpoint of a run that was stopped.
    """
    report = finetuning.finetune(
        model, task, recipe, output,
        tokenizer=tokenizer, overwrite=overwrite, resume=resume, on_progress=on_progress,
    )  # fmt: skip
    metrics, folder = report.metrics, report.folder
    shown = [scores_table(metrics["task"], f"{model} -> {folder}"), seconds_line(metrics)]
    return Outcome({"folder": folder, "metrics": metrics}, shown, _after(report, tokenizer))


def _after(report: Report, tokenizer: str | None) -> list[str]:
    """What to try with a model that was taught a task: of a student none is made."""
    folder = report.folder
    if not report.is_student:
        made = {"teacher": folder, "budget__keep_linears": 0.5, "output": f"{folder}-student"}
        return [command("compress", **made) + "   # a student of it, on the same task"]
    pair = (folder, "TEACHER", tokenizer, None)
    return [
        command_on_pair("evaluate", *pair) + "   # beside a whole model that was taught the same task",
        command_on_pair("bench", *pair) + "   # is it faster?",
    ]
