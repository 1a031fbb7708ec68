"""What a command has to say at its end, for people and for machines; printed in one place, by `makd.cli.main`.

Commands print nothing themselves: so `--json` and `--quiet` mean the same on all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from makd.cli.terminal import print_table
from makd.shell import command, command_on_pair


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    content: Any
    """What `--json` prints: anything that `makd.run_folder.plain` makes maps, lists, texts and numbers of."""
    shown: Sequence[Any] = ()
    """What a person sees in its place: lines, and tables of rich's."""
    next: Sequence[str] = ()
    """Commands to try after this one, each with a comment that says what for."""
    check: Callable[[], None] = lambda: None
    """Raises what is wrong all the same, when the result was shown."""


def print_outcome(outcome: Outcome, *, as_json: bool, quiet: bool) -> None:
    """The result on stdout: one JSON document, or what a person sees with what to try next."""
    if as_json:
        from makd.run_folder import to_json

        print(to_json(outcome.content, indent=2))
        return
    for part in outcome.shown:
        if isinstance(part, str):
            print(part)
        else:
            print_table(part)
    if outcome.next and not quiet:
        print("\nnext:", *(f"  {line}" for line in outcome.next), sep="\n")


def after_student(
    folder: object, teacher: str, tokenizer: str | None, head: str, metrics: Mapping[str, Any]
) -> list[str]:
    """What to try with a student that was made of `teacher`, read under `head`."""
    own = (folder, teacher, tokenizer, head)
    is_decoder = "perplexity" in metrics
    export = {"to": "dense"} if is_decoder else {"to": "onnx", "quantize": "int8"}
    return [
        command("report", folder) + "   # look at it: what was lost, and where",
        command_on_pair("bench", *own) + "   # is it faster here, and in which format?",
        command_on_pair("evaluate", *own) + "   # on its task"
        if "task" in metrics
        else command_on_pair("evaluate", *own, data__path="texts.txt") + "   # on other text",
        command("export", folder, **export, output=f"{folder}-{export['to']}") + "   # for other runtimes",
    ]
