"""The command `makd completion`: prints what makes bash, zsh or fish complete commands, flags and values.

The words are written into the script when it is made: pressing Tab starts no Python, which would take seconds.
"""

import shlex
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from makd.errors import MakdError
from makd.registry import Registry, unknown_name

USAGE = """Say for which shell: bash, zsh or fish. To have it in every new one:
  makd completion bash > ~/.local/share/bash-completion/completions/makd
  makd completion zsh  > ~/.zfunc/_makd       # with `fpath+=~/.zfunc` before `compinit` in ~/.zshrc
  makd completion fish > ~/.config/fish/completions/makd.fish"""

Words = Mapping[str, Mapping[str, Sequence[str]]]
"""Command -> flag -> the values that it may have, where they are few; a flag of a file or a number has none."""


def complete(words: Sequence[str]) -> str:
    """The script for the shell that `words` name.

    Raises:
        MakdError: they name none, or one that is not known.
    """
    if not words or words[0] in ("-h", "--help"):
        if words:
            return USAGE
        raise MakdError(USAGE)
    if words[0] not in SHELLS:
        raise unknown_name("shell", words[0], SHELLS)
    return SHELLS[words[0]](known_words())


def known_words() -> Words:
    """All that can be completed."""
    from makd.cli.main import COMMANDS, make_parser
    from makd.cli.terminal import hush_imports

    hush_imports()
    found: dict[str, Mapping[str, Sequence[str]]] = {}
    for name, command in COMMANDS.items():
        parser = make_parser(name, command, command.load())
        found[name] = {
            flag: _values(flag, action)
            for action in parser._actions
            for flag in action.option_strings
            if flag.startswith("--")
        }
    return {**found, "completion": {}}


def _values(flag: str, action: Any) -> Sequence[str]:
    if flag == "--effort":
        from makd.efforts import EFFORTS

        return list(EFFORTS)
    if flag == "--recipe.plan.preset":
        from makd.aspects import PRESETS

        return list(PRESETS)
    if flag == "--recipe.factorize.solver":
        from makd.solvers import SOLVERS

        return ["auto", *SOLVERS]
    kind = getattr(action, "_typehint", None)
    if kind is bool:
        return ["true", "false"]
    parts = [one for one in (kind, *typing.get_args(kind)) if typing.get_origin(one) is typing.Literal]
    return [str(value) for one in parts for value in typing.get_args(one)]


def _bash(words: Words) -> str:
    return f"""# makd's commands, flags and values, for bash
_makd() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} values=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W {shlex.quote(" ".join([*words, "--help", "--version"]))} -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}} $before" in
{_cases(words)}
    esac
    if [ -n "$values" ]; then
        COMPREPLY=($(compgen -W "$values" -- "$word"))
    elif [[ "$word" == -* ]]; then
        case "${{COMP_WORDS[1]}}" in
{_flags(words)}
        esac
        COMPREPLY=($(compgen -W "$values" -- "$word"))
    fi
}}
complete -o default -F _makd makd"""


def _zsh(words: Words) -> str:
    return f"#compdef makd\nautoload -U +X bashcompinit && bashcompinit\n{_bash(words)}"


def _cases(words: Words) -> str:
    lines = [
        f"        {shlex.quote(f'{command} {flag}')}) values={shlex.quote(' '.join(values))};;"
        for command, flags in words.items()
        for flag, values in flags.items()
        if values
    ]
    shells = " ".join(SHELLS)
    return "\n".join([*lines, f"        'completion completion') values={shlex.quote(shells)};;"])


def _flags(words: Words) -> str:
    return "\n".join(
        f"            {command}) values={shlex.quote(' '.join(flags))};;" for command, flags in words.items() if flags
    )


def _fish(words: Words) -> str:
    return "\n".join(_fish_lines(words))


def _fish_lines(words: Words) -> Iterator[str]:
    from makd.cli.main import COMMANDS

    yield "# makd's commands, flags and values, for fish"
    for command, flags in words.items():
        summary = COMMANDS[command].summary if command in COMMANDS else "Print what makes a shell complete all of this."
        yield f"complete -c makd -n __fish_use_subcommand -f -a {command} -d {shlex.quote(summary)}"
        for flag, values in flags.items():
            given = f" -x -a {shlex.quote(' '.join(values))}" if values else ""
            yield f"complete -c makd -n '__fish_seen_subcommand_from {command}' -l {flag[2:]}{given}"
    yield f"complete -c makd -n '__fish_seen_subcommand_from completion' -f -a {shlex.quote(' '.join(SHELLS))}"


SHELLS: Registry[Callable[[Words], str]] = Registry("shell", {"bash": _bash, "zsh": _zsh, "fish": _fish})
