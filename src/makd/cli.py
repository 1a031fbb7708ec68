"""The command line: every subcommand is one function, and its flags are that function's parameters.

No logic of its own: it turns flags and YAML into the dataclasses (jsonargparse), calls the pipeline, and prints.
Heavy imports wait until a subcommand runs, so that `makd --help` answers at once.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from makd.errors import MakdError
from makd.registry import unknown_name
from makd.task_commands import expand, load_finetune, task_or_data
from makd.terminal import TERMINATED, Terminated, set_up_logging, unwind_at_sigterm
from makd.terminal import print_metrics as _print_metrics
from makd.terminal import print_table as _print
from makd.terminal import progress_bars as _progress_bars

USER_ERROR = 2
"""Exit code for what the user can mend."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `makd ARGUMENTS...`; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"makd {version('makd')}")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise unknown_name("command", words[0], COMMANDS)
        return _run(words[0], words[1:])
    except MakdError as error:
        print(f"makd: {error}", file=sys.stderr)
        return USER_ERROR
    except (KeyboardInterrupt, Terminated) as stop:
        print("makd: stopped. Outputs that were finished before are as they were.", file=sys.stderr)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    load: Callable[[], Callable[..., None]]
    """Imports what it needs, and gives the function that does it."""
    summary: str
    example: str
    positional: tuple[str, ...] = ()
    """Parameters that stand without a flag."""


def _run(name: str, words: list[str]) -> int:
    import jsonargparse

    from makd.parsing import PARSING_ERRORS, explain

    command = COMMANDS[name]
    function = command.load()
    parser = jsonargparse.ArgumentParser(
        prog=f"makd {name}", description=f"{command.summary}\n\nexample: {command.example}", exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    switches = [flag for flag in _SWITCHES if flag in function.__annotations__]
    for parameter in command.positional:
        parser.add_argument(parameter, type=str)
    parser.add_function_arguments(function, as_positional=False, skip={*switches, *command.positional})
    for flag in switches:
        parser.add_argument(f"--{flag}", action="store_true", help=_SWITCHES[flag])
    try:
        settings = parser.instantiate(parser.parse_args(expand(name, words, command.positional)))
    except MakdError:
        raise
    except PARSING_ERRORS as error:
        raise MakdError(f"{explain(error, parser.get_defaults().keys())}\nSee `makd {name} --help`.") from error
    settings.pop("config", None)
    for flag in switches:  # a file may hold anything in their place
        if not isinstance(settings[flag], bool):
            raise MakdError(f"{flag} is true or false; got {settings[flag]!r}.\nSee `makd {name} --help`.")
    set_up_logging()
    unwind_at_sigterm()
    function(**{key: getattr(settings, key) for key in function.__annotations__ if key != "return"})
    return 0


def _load_inspect() -> Callable[..., None]:
    from makd.anatomy import describe, resolve, to_table
    from makd.loading import load_model

    def inspect(model: str, head: str = "auto") -> None:
        """Print where a model keeps its layers and linears, their shapes, parameters and break-even ranks.

        Args:
            model: hub id, folder, .gguf file, or package:module/path.
            head: auto, base, masked_lm, causal_lm, sequence_classification, ...
        """
        loaded = load_model(model, head)
        _print(to_table(describe(loaded, resolve(loaded))))

    return inspect


def _load_compress() -> Callable[..., None]:
    from makd import pipeline
    from makd.config import Recipe
    from makd.data import DataConfig
    from makd.lowrank.budget import Budget
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
        """
        with _progress_bars() as progress:
            report = pipeline.compress(
                teacher, task_or_data(data, task), budget, recipe, output,
                tokenizer=tokenizer, overwrite=overwrite, resume=resume, on_progress=progress,
            )  # fmt: skip
        _print_metrics(report.metrics, f"{teacher} -> {report.folder}")

    return compress


def _load_factorize() -> Callable[..., None]:
    from makd import pipeline, streaming
    from makd.config import Recipe
    from makd.data import DataConfig
    from makd.lowrank.budget import Budget
    from makd.tasks import TaskConfig

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
        """
        make = streaming.factorize_streamed if stream else pipeline.factorize_only
        with _progress_bars() as progress:
            report = make(
                teacher, task_or_data(data, task), budget, recipe, output,
                tokenizer=tokenizer, overwrite=overwrite, on_progress=progress,
            )  # fmt: skip
        _print_metrics(report.metrics, f"{teacher} -> {report.folder}")

    return factorize


def _load_distill() -> Callable[..., None]:
    from makd import pipeline
    from makd.config import Recipe
    from makd.data import DataConfig
    from makd.tasks import TaskConfig

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
        with _progress_bars() as progress:
            report = pipeline.distill(
                student, teacher, task_or_data(data, task), recipe, output,
                tokenizer=tokenizer, overwrite=overwrite, resume=resume, on_progress=progress,
            )  # fmt: skip
        _print_metrics(report.metrics, f"{student} -> {report.folder}")

    return distill


def _load_evaluate() -> Callable[..., None]:
    from makd import pipeline
    from makd.config import Recipe
    from makd.data import DataConfig
    from makd.report import OutputFile
    from makd.tasks import TaskConfig

    def evaluate(
        student: str,
        teacher: str,
        data: DataConfig | None = None,
        task: TaskConfig | None = None,
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
            recipe: its evaluation part says what is measured.
            tokenizer: where the tokenizer is, if not with the teacher.
            json: file to write the measurements to.
            overwrite: replace that file.
        """
        file = None if json is None else OutputFile(json, overwrite)
        chosen = pipeline.data_of(student) if data is None and task is None else task_or_data(data, task)
        with _progress_bars() as progress:
            metrics = pipeline.evaluate(student, teacher, chosen, recipe, tokenizer=tokenizer, on_progress=progress)
        _print_metrics(metrics, f"{student} against {teacher}")
        if file is not None:
            file.write(metrics)

    return evaluate


def _load_cache() -> Callable[..., None]:
    from makd.cache_command import keep

    return keep


def _load_demo() -> Callable[..., None]:
    from makd.demo import DEMOS, reload_in_new_process

    def demo(name: str, output: str | None = None) -> None:
        """Compress a real model that a Python package carries, and load the student in a new process.

        Args:
            name: minilm (an encoder) or smollm2 (a decoder).
            output: folder for the student, replaced if it is there; without it runs/demo or runs/demo-lm.
        """
        chosen = DEMOS[name]
        folder = output or chosen.output
        _run("compress", ["--config", str(chosen.recipe_path), "--output", folder, "--overwrite"])
        print(reload_in_new_process(folder, chosen.auto_class))

    return demo


def _load_bench() -> Callable[..., None]:
    from makd.bench_command import bench

    return bench


def _load_compare() -> Callable[..., None]:
    from makd.compare_command import compare

    return compare


COMMANDS = {
    "inspect": Command(
        _load_inspect,
        "Show where a model keeps its layers and linears, and at which ranks factors begin to save.",
        "makd inspect sentence-transformers/all-MiniLM-L6-v2",
        ("model",),
    ),
    "factorize": Command(
        _load_factorize,
        "Make a student without training it.",
        "makd factorize --teacher MODEL --budget.keep_linears 0.5 --output runs/start",
    ),
    "distill": Command(
        _load_distill,
        "Teach a student that was factorized.",
        "makd distill runs/start --teacher MODEL --output runs/taught",
        ("student",),
    ),
    "compress": Command(
        _load_compress,
        "The whole path: factorize, distill, evaluate, save.",
        "makd compress --config examples/minilm.yaml",
    ),
    "cache": Command(
        _load_cache,
        "Keep what a teacher says about the training rows, for training without it.",
        "makd cache --teacher MODEL --output caches/MODEL",
    ),
    "finetune": Command(
        load_finetune,
        "Teach a model a task from its labels: makes the teacher of that task.",
        "makd finetune MODEL --task glue/mrpc --output runs/teacher",
        ("model",),
    ),
    "evaluate": Command(
        _load_evaluate,
        "Measure a student against its teacher.",
        "makd evaluate runs/student --teacher MODEL",
        ("student",),
    ),
    "bench": Command(
        _load_bench,
        "Time a student against its teacher; save one with its slow linears dense again.",
        "makd bench runs/student --teacher MODEL",
        ("student",),
    ),
    "compare": Command(
        _load_compare,
        "Methods side by side at an equal budget, over tasks and seeds.",
        "makd compare examples/encoder/experiment.yaml --only task=mrpc,seed=1",
        ("experiment",),
    ),
    "demo": Command(
        _load_demo,
        "Compress a real model that a Python package carries, on this machine, without data.",
        "makd demo minilm",
        ("name",),
    ),
}

_SWITCHES = {
    "dry_run": "print the cells, and which are done; run nothing",
    "compile": "time torch.compiled forwards too",
    "fold": "save the student with those linears dense where factored is slower, to --output",
    "overwrite": "replace the output that makd wrote there before, when all is done",
    "resume": "go on from the last checkpoint of a run that was stopped",
    "stream": "from files to files, for teachers larger than memory; the student is not compared with its teacher",
}


def _help() -> str:
    rows = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: makd COMMAND ...\n\nSmaller copies of language models: low-rank factors, taught from several sides at "
        f"once.\n\n{rows}\n\n`makd COMMAND --help` shows its settings; a YAML file (--config) can hold all of them.\n"
        f"example: {COMMANDS['compress'].example}"
    )


if __name__ == "__main__":
    sys.exit(main())
