"""The command `makd bench`: its flags are the parameters of `bench` below. Tells what `makd.speed` measures."""

from typing import Any

from makd import speed
from makd.cli.outcome import Outcome
from makd.cli.tasks import task_or_data
from makd.data import DataConfig
from makd.evaluation.speed import BenchConfig
from makd.evaluation.verdict import verdicts
from makd.progress import OnProgress
from makd.run_folder.formats import formats_table
from makd.run_folder.speed import decoding_table, fold_line, linears_table, speed_content, speed_table
from makd.shell import command_on_pair
from makd.tasks import TaskConfig


def bench(
    on_progress: OnProgress,
    student: str,
    teacher: str,
    batches: tuple[int, ...] = (1, 16),
    lengths: tuple[int, ...] = (128,),
    point: tuple[int, int] | None = None,
    new_tokens: int = 32,
    compile: bool = False,
    repeats: int = 15,
    threads: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    formats: tuple[str, ...] = (),
    data: DataConfig = DataConfig(),  # noqa: B008 - frozen
    task: TaskConfig | None = None,
    head: str = "auto",
    tokenizer: str | None = None,
    card: bool = True,
    fold: bool = False,
    output: str | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Time a student against its teacher, and save one whose slow linears are dense again.

    Args:
        on_progress: called with a `Progress` after each unit of work.
        student: folder of a student.
        teacher: hub id, folder, .gguf file, or package:module/path.
        batches: rows of a forward.
        lengths: tokens of a row; every batch is timed at every length.
        point: batch and length at which it is decided which linears to fold; without it, the first of each.
        new_tokens: tokens that a causal language model writes after each row; 0 times no generation.
        compile: time torch.compiled forwards too.
        repeats: forwards of each model that count, the models taking turns.
        threads: threads of torch on a CPU; without it, as many as torch takes.
        dtype: float32, bfloat16 or float16.
        device: cpu, cuda, ...; auto takes an accelerator if there is one.
        formats: time and measure both in the numbers and runtimes that they may be served in, on the CPU: any of
            torch-float32, torch-bfloat16, torch-int8, onnx-float32, onnx-int8.
        data: text that formats are measured on; without it, what the student was made with.
        task: a task instead of text; `--task NAME --task_data PATH` for short.
        head: with which head the teacher is loaded: auto, base, masked_lm, causal_lm, ...
        tokenizer: where the tokenizer is that formats are measured with, if not with the teacher.
        card: put the table into the student's README.md, and bench.json beside it.
        fold: save the student with those linears dense where factored is slower, to --output.
        output: folder for that student.
        overwrite: replace the output folder when all is done.
    """
    settings = BenchConfig(
        batches=batches, lengths=lengths, point=point, new_tokens=new_tokens, compile=compile, repeats=repeats,
        threads=threads, dtype=dtype, device=device, formats=formats,
    )  # fmt: skip
    chosen = None if data == DataConfig() and task is None else task_or_data(data, task, student)
    report = speed.bench(
        student, teacher, settings,
        card=card, fold=fold, output=output, overwrite=overwrite, head=head,
        tokenizer=tokenizer, data=chosen, on_progress=on_progress,
    )  # fmt: skip
    batch, length = settings.fold_point
    found = report.speed
    shown: list[Any] = [speed_table(found, f"{student} against {teacher}")]
    if found.decoding:
        shown.append(decoding_table(found, "generation, with keys and values kept"))
    shown.append(linears_table(found, f"linears at {batch} x {length} tokens"))
    compiling = [row.compile_seconds for row in found.forwards if row.compile_seconds is not None]
    if compiling:
        shown.append(f"compiling: {min(compiling):.1f} to {max(compiling):.1f} s a model and shape, not in the table")
    shown.append(fold_line(found, settings.fold_point))
    if report.formats:
        shown += [formats_table(report.formats, "as they may be served"), *verdicts(report.formats)]
    if report.card is not None:
        shown.append(f"written: {report.card / 'README.md'}, {report.card / 'bench.json'}")
    folder = report.folder
    if folder is not None:
        shown.append(f"the student with dense linears: {folder}")
    content = speed_content(found, report.formats, settings, report.environment)
    after = []
    if folder is not None:
        after.append(command_on_pair("evaluate", folder, teacher, tokenizer, head) + "   # it is as good as before")
    elif found.fold:
        faster = command_on_pair("bench", student, teacher, tokenizer, head, fold="", output=f"{student}-folded")
        after.append(f"{faster}   # save it with those linears dense")
    return Outcome({**content, "folder": folder}, shown, after)
