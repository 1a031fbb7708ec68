"""The command line: every subcommand is one function, and its flags are that function's parameters.

No logic of its own: it turns flags and YAML into the dataclasses (jsonargparse), calls the pipeline, and prints.
Heavy imports wait until a subcommand runs, so that `makd --help` answers at once.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_type_hints

from makd.cli.others import is_of_lost_process, run_silently
from makd.cli.tasks import expand, load_finetune
from makd.cli.terminal import TERMINATED, Terminated, set_up_logging, unwinding_at_sigterm
from makd.cli.terminal import print_table as _print
from makd.errors import MakdError
from makd.processes.started import check_alone, close, is_first
from makd.registry import unknown_name

USER_ERROR = 2
"""Exit code for what the user can mend."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

LOST = 1
"""Exit code where another process of the run is gone: not one that the user's settings could mend."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `makd ARGUMENTS...`; returns the exit code. Of several processes only the first prints."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _attempt(words) if is_first() else run_silently(lambda: _attempt(words))
    except (MakdError, RuntimeError) as error:
        if is_of_lost_process(error):
            line = str(error).splitlines()[0]
            print(f"makd: another process of this run is gone, so it ends ({line})", file=sys.stderr)
            return LOST
        if not isinstance(error, MakdError):
            raise
        print(f"makd: {error}", file=sys.stderr)
        return USER_ERROR
    except (KeyboardInterrupt, Terminated) as stop:
        if is_first():
            print("makd: stopped. Outputs that were finished before are as they were.", file=sys.stderr)
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    close()
    return code


def _attempt(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"makd {version('makd')}")
        return 0
    if words[0] not in COMMANDS:
        raise unknown_name("command", words[0], COMMANDS)
    return _run(words[0], words[1:])


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

    from makd.cli.parsing import PARSING_ERRORS, SYNTAX, check_files, explain
    from makd.kinds import fit

    command = COMMANDS[name]
    function = command.load()
    kinds = {key: kind for key, kind in get_type_hints(function).items() if key != "return"}
    parser = jsonargparse.ArgumentParser(
        prog=f"makd {name}",
        description=f"{command.summary}\n\nexample: {command.example}",
        exit_on_error=False,
        allow_abbrev=False,  # half a flag is a slip, and `--overwrit` would replace a folder
        parser_mode=SYNTAX,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    switches = [flag for flag in _SWITCHES if flag in function.__annotations__]
    for parameter in command.positional:
        if kinds[parameter] == list[str]:
            parser.add_argument(parameter, type=str, nargs="+")
        else:
            parser.add_argument(parameter, type=str)
    parser.add_function_arguments(function, as_positional=False, skip={*switches, *command.positional})
    for flag in switches:
        parser.add_argument(f"--{flag}", action="store_true", help=_SWITCHES[flag])
    words = expand(name, words, command.positional)
    check_files(words, kinds)
    try:
        settings = parser.instantiate(parser.parse_args(words))
    except MakdError:
        raise
    except PARSING_ERRORS as error:
        raise MakdError(f"{explain(error, parser.get_defaults().keys())}\nSee `makd {name} --help`.") from error
    settings.pop("config", None)
    given = {key: fit(getattr(settings, key), kind, key) for key, kind in kinds.items()}
    set_up_logging()
    with unwinding_at_sigterm():
        function(**given)
    return 0


def _load_inspect() -> Callable[..., None]:
    from makd.anatomy import to_table
    from makd.capture import inspect as look
    from makd.loading import load_model

    def inspect(model: str, head: str = "auto") -> None:
        """Print where a model keeps its layers and linears, their shapes, parameters and break-even ranks.

        Args:
            model: hub id, folder, .gguf file, or package:module/path.
            head: auto, base, masked_lm, causal_lm, sequence_classification, ...
        """
        _print(to_table(look(load_model(model, head))))

    return inspect


def _load_compress() -> Callable[..., None]:
    from makd.cli.runs import compress

    return compress


def _load_factorize() -> Callable[..., None]:
    from makd.cli.runs import factorize

    return factorize


def _load_distill() -> Callable[..., None]:
    from makd.cli.runs import distill

    return distill


def _load_evaluate() -> Callable[..., None]:
    from makd.cli.runs import evaluate

    return evaluate


def _load_cache() -> Callable[..., None]:
    from makd.cli.cache import keep

    return keep


def _load_demo() -> Callable[..., None]:
    from makd.cli.demo import DEMOS, reload_in_new_process
    from makd.html_report import check_extra, write_report

    def demo(name: str, output: str | None = None) -> None:
        """Compress a real model that a Python package carries, and load the student in a new process.

        Args:
            name: minilm (an encoder) or smollm2 (a decoder).
            output: folder for the student, replaced if it is there; without it runs/demo or runs/demo-lm.
        """
        check_alone("A demo", "Start it without torchrun or accelerate launch.")
        check_extra()
        chosen = DEMOS[name]
        folder = output or chosen.output
        _run("compress", ["--config", str(chosen.recipe_path), "--output", folder, "--overwrite"])
        print(reload_in_new_process(folder, chosen.auto_class))
        print(f"report: {write_report([folder])}")

    return demo


def _load_bench() -> Callable[..., None]:
    from makd.cli.bench import bench

    return bench


def _load_export() -> Callable[..., None]:
    from makd.cli.export import export

    return export


def _load_report() -> Callable[..., None]:
    from makd.cli.report import report

    return report


def _load_compare() -> Callable[..., None]:
    from makd.cli.compare import compare

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
    "report": Command(
        _load_report,
        "Show runs as one HTML page: how much smaller, faster, worse, where, and what to try next.",
        "makd report runs/student",
        ("runs",),
    ),
    "bench": Command(
        _load_bench,
        "Time a student against its teacher; save one with its slow linears dense again.",
        "makd bench runs/student --teacher MODEL",
        ("student",),
    ),
    "export": Command(
        _load_export,
        "Write a student for other runtimes: ONNX, a dense model, a torch program, GGUF.",
        "makd export runs/student --to onnx --quantize int8 --output runs/onnx",
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
    "dry_run": "print what would be done, and about how long it takes; do nothing",
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
