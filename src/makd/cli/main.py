"""The command line: every subcommand is one function, and its flags are that function's parameters.

No logic of its own: it turns flags and YAML into the dataclasses (jsonargparse), calls the pipeline, and prints what
that has found.
Heavy imports wait until a subcommand runs, so that `makd --help` answers at once.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from makd.cli.memory import describe_shortage, ran_out
from makd.cli.others import is_of_lost_process, run_silently
from makd.cli.outcome import Outcome, print_outcome
from makd.cli.progress import showing
from makd.cli.tasks import expand
from makd.cli.terminal import TERMINATED, Terminated, hush_imports, set_up_logging, unwinding_at_sigterm
from makd.errors import MakdError
from makd.processes.started import close, is_first
from makd.registry import unknown_name

USER_ERROR = 2
"""Exit code for what the user can mend."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

BROKEN_PIPE = 141
"""Exit code where nobody reads what is printed any more, as shells have it."""

LOST = 1
"""Exit code where another process of the run is gone: not one that the user's settings could mend."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `makd ARGUMENTS...`; returns the exit code. Of several processes only the first prints."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _attempt(words) if is_first() else run_silently(lambda: _attempt(words))
        sys.stdout.flush()
    except (MakdError, RuntimeError, MemoryError) as error:
        if not isinstance(error, MakdError) and ran_out(error):
            print(f"makd: {describe_shortage(error)}", file=sys.stderr)
            return USER_ERROR
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
    except BrokenPipeError:
        if _is_read():  # another pipe broke, as to a process that died
            raise
        # whoever read has seen enough, as `| head` has; what Python would still write at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    close()
    return code


def _is_read() -> bool:
    """Whether somebody still reads what is printed."""
    try:
        print(flush=True)  # there is no asking without writing
    except BrokenPipeError:
        return False
    return True


def _attempt(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"makd {version('makd')}")
        return 0
    if words[0] == "completion":
        from makd.cli.completion import complete

        print(complete(words[1:]))
        return 0
    if words[0] not in COMMANDS:
        raise unknown_name("command", words[0], [*COMMANDS, "completion"])
    return _run(words[0], words[1:])


@dataclass(frozen=True)
class Command:
    """A subcommand."""

    place: str
    """`module:function` in `makd.cli`, imported when it is asked for."""
    summary: str
    example: str
    positional: tuple[str, ...] = ()
    """Parameters that stand without a flag."""

    def load(self) -> Callable[..., Outcome]:
        """The function that does it, and with it all that it needs."""
        module, _, name = self.place.partition(":")
        function: Callable[..., Outcome] = getattr(importlib.import_module(f"makd.cli.{module}"), name)
        return function


def _run(name: str, words: list[str]) -> int:
    as_json, quiet = ("--json" in words), ("--quiet" in words)
    words = [word for word in words if word not in ("--json", "--quiet")]
    hush_imports()
    if not quiet and not {"-h", "--help"} & set(words):
        print(f"makd: {name}: loading libraries", file=sys.stderr, flush=True)
    function = COMMANDS[name].load()
    given = read_command(name, words)
    set_up_logging(quiet)
    with unwinding_at_sigterm(), showing(quiet) as on_progress:
        outcome = function(on_progress, **given)
    print_outcome(outcome, as_json=as_json, quiet=quiet)
    outcome.check()
    return 0


def make_parser(name: str, command: Command, function: Callable[..., Outcome]) -> Any:
    """The parser of a command's words: flags of all commands, and the parameters of its function."""
    import jsonargparse

    from makd.cli.parsing import SYNTAX

    class Help(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
        """The example stands on a line of its own."""

    # what --help says of a setting is what stands below its field
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=f"makd {name}",
        usage=" ".join(["makd", name, *(word.upper() for word in command.positional), "[--SETTING VALUE ...]"]),
        formatter_class=Help,
        description=f"{command.summary}\n\nexample: {command.example}",
        exit_on_error=False,
        allow_abbrev=False,  # half a flag is a slip, and `--overwrit` would replace a folder
        parser_mode=SYNTAX,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below")
    for flag, meaning in _EVERYWHERE.items():
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    switches = [flag for flag in _SWITCHES if flag in function.__annotations__]
    kinds = get_type_hints(function)
    for parameter in command.positional:
        parser.add_argument(parameter, type=str, nargs="+" if kinds[parameter] == list[str] else None)
    parser.add_function_arguments(function, as_positional=False, skip={"on_progress", *switches, *command.positional})
    for flag in switches:
        parser.add_argument(f"--{flag}", action="store_true", help=_SWITCHES[flag])
    return parser


def read_command(name: str, words: list[str]) -> dict[str, Any]:
    """What the function of a command is called with, by words without the switches of every command.

    Raises:
        MakdError: with what is wrong with the words, or with a file that they name.
    """
    from makd.cli.parsing import PARSING_ERRORS, check_files, explain, keep_texts, plain_texts_
    from makd.kinds import fit

    command = COMMANDS[name]
    function = command.load()
    kinds = {key: kind for key, kind in get_type_hints(function).items() if key not in ("return", "on_progress")}
    parser = make_parser(name, command, function)
    words = expand(name, words, command.positional)
    check_files(words, kinds)
    words = keep_texts(words, kinds)
    try:
        settings = parser.instantiate(plain_texts_(_parse(parser, words, with_effort="effort" in kinds)))
    except MakdError:
        raise
    except PARSING_ERRORS as error:
        raise MakdError(f"{explain(error, parser.get_defaults().keys())}\nSee `makd {name} --help`.") from error
    for switch in _EVERYWHERE:
        if settings[switch] is not False:
            raise MakdError(
                f"--{switch} is said on the command line, not in a file; got {switch}: {settings[switch]!r}."
            )
    return {key: fit(getattr(settings, key), kind, key) for key, kind in kinds.items()}


def _parse(parser: Any, words: list[str], *, with_effort: bool) -> Any:
    if not with_effort:
        return parser.parse_args(words)
    from makd.cli.effort import parse_with_effort  # needs torch, which not every command does

    return parse_with_effort(parser, words)


COMMANDS = {
    "inspect": Command(
        "inspect:inspect",
        "Show where a model keeps its layers and linears, and at which ranks factors begin to save.",
        "makd inspect sentence-transformers/all-MiniLM-L6-v2",
        ("model",),
    ),
    "factorize": Command(
        "runs:factorize",
        "Make a student without training it.",
        "makd factorize --teacher MODEL --budget.keep_linears 0.5 --output runs/start",
    ),
    "distill": Command(
        "runs:distill",
        "Teach a student that was factorized.",
        "makd distill runs/start --teacher MODEL --output runs/taught",
        ("student",),
    ),
    "compress": Command(
        "runs:compress",
        "The whole path: factorize, distill, evaluate, save.",
        "makd compress --config examples/minilm.yaml",
    ),
    "cache": Command(
        "cache:keep",
        "Keep a teacher's outputs on the training rows, for training without it.",
        "makd cache --teacher MODEL --output caches/MODEL",
    ),
    "finetune": Command(
        "finetune:finetune",
        "Teach a model a task from its labels: makes the teacher of that task.",
        "makd finetune MODEL --task glue/mrpc --output runs/teacher",
        ("model",),
    ),
    "evaluate": Command(
        "runs:evaluate",
        "Measure a student against its teacher.",
        "makd evaluate runs/student --teacher MODEL",
        ("student",),
    ),
    "report": Command(
        "report:report",
        "Show runs as one HTML page: how much smaller, faster, worse, where, and what to try next.",
        "makd report runs/student",
        ("runs",),
    ),
    "bench": Command(
        "bench:bench",
        "Time a student against its teacher; save one with its slow linears dense again.",
        "makd bench runs/student --teacher MODEL",
        ("student",),
    ),
    "export": Command(
        "export:export",
        "Write a student for other runtimes: ONNX, a dense model, a torch program, GGUF.",
        "makd export runs/student --to onnx --quantize int8 --output runs/onnx",
        ("student",),
    ),
    "compare": Command(
        "compare:compare",
        "Methods side by side at an equal budget, over tasks and seeds.",
        "makd compare examples/encoder/experiment.yaml --only task=mrpc,seed=1",
        ("experiment",),
    ),
    "ablate": Command(
        "ablate:ablate",
        "A run without each aspect of its plan, over seeds: what each brings.",
        "makd ablate examples/task.yaml --output runs/ablation",
        ("run",),
    ),
    "demo": Command(
        "demo:demo",
        "Compress a real model that a Python package carries, on this machine, without data.",
        "makd demo minilm",
        ("name",),
    ),
}

_EVERYWHERE = {
    "json": "print the result as one JSON document; stdout holds nothing else",
    "quiet": "show nothing but errors and the result",
}
"""Switches of every command."""

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
    rows += "\n  completion Print what makes a shell complete all of this: bash, zsh or fish."
    return (
        "usage: makd COMMAND ...\n\nSmaller copies of language models: low-rank factors, taught from several sides at "
        f"once.\n\n{rows}\n\n`makd COMMAND --help` shows its settings; a YAML file (--config) can hold all of them.\n"
        "--json prints a command's result for machines, --quiet nothing else but errors.\n"
        f"example: {COMMANDS['compress'].example}"
    )


if __name__ == "__main__":
    sys.exit(main())
