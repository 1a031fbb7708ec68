"""What is wrong with settings that do not parse, in this project's words. Stands below the commands, which parse.

jsonargparse finds the mistake, in a flag or in YAML, and tells it with Python's names of types and one paragraph for
each thing that a setting might have been. Here that becomes a line: which setting, what is allowed, what was met.
A message of a kind that is not known here stays as it is.
"""

import dataclasses
import difflib
import importlib
import itertools
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from makd.errors import MakdError, SettingError
from makd.kinds import KINDS, shown
from makd.plain_yaml import load_yaml, read_yaml
from makd.registry import unknown_name

SYNTAX = "makd"
"""The parser's mode in which whatever it reads, files and flags, goes through `load_yaml`."""
PARSING_ERRORS = (jsonargparse.ArgumentError, TypeError, ValueError)
"""What jsonargparse raises when it is given wrong settings."""


def _load(text: str) -> Any:
    """YAML; a word that only looks like a map (`C:`) is a word."""
    value = load_yaml(text)
    is_word = isinstance(value, dict) and list(value.values()) == [None] and text.strip() == f"{next(iter(value))}:"
    return text if is_word else value


jsonargparse.set_loader(SYNTAX, _load, exceptions=(SettingError,))

_KEY = re.compile(r'(?P<indent> *)(?:- )?Parser key "(?P<name>.+)":')


def explain(error: BaseException, known: Iterable[str] = ()) -> str:
    """What a person needs of a parser's error.

    Args:
        error: one of `PARSING_ERRORS`; if the project's own checks raised it, their text is the answer.
        known: dotted names of the settings that there are, of which the nearest to an unknown one are offered.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MakdError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    message, names = str(error), list(known)
    for read in (_unknown_flag, _unknown_part, _unknown_setting, _missing, _no_file, _wrong_value):
        told = read(message, names)
        if told is not None:
            return told
    return message


def check_files(words: Sequence[str], kinds: Mapping[str, Any]) -> None:
    """Refuse YAML, in files and flags, that cannot be read or has no map where settings have names.

    The parser takes a list in the place of a map for nothing, without a word.

    Args:
        words: of the command line.
        kinds: the command's parameters and their types.

    Raises:
        SettingError: YAML cannot be read, or something else stands where a map has to.
    """
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        value = value if equals else next(iter(words[place + 1 :]), "")
        name = flag.removeprefix("--")
        inside = kinds if flag == "--config" else _kinds_at(name.split("."), kinds) if flag != name else None
        if inside is None or not value:
            continue
        if value.lstrip().startswith("{"):
            content = load_yaml(value, flag)
        elif flag == "--config" or _is_there(value):
            content = read_yaml(Path(value))
        else:
            continue  # the parser says what is wrong with it
        if not isinstance(content, dict):
            raise SettingError(f"{value} holds no settings (name: value, a line each); got {shown(content)}.")
        if flag == "--config" and "config" in content:
            raise SettingError(f"{value} names another file with `config`. Give several --config instead.")
        check_maps(content, inside, f"{value}: " if flag == "--config" else f"{name}.")


def _is_there(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # longer than any name of a file
        return False


class AsTyped(str):
    """A word that is a text: the parser looks for YAML in words of type `str` only."""

    __slots__ = ()


def keep_texts(words: Sequence[str], kinds: Mapping[str, Any]) -> list[str]:
    """The words, with those that are values of texts as they were typed.

    Of settings that may be null (`instructions`) the parser reads every value as YAML: `summarize: {prompt}` was a map.

    Args:
        words: of the command line.
        kinds: the command's parameters and their types.
    """
    kept: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if kept and _is_text(kept[-1], word, kinds):
            kept.append(AsTyped(word))
        elif equals and (" " in value or not value.startswith("-")) and _is_text(flag, value, kinds):
            kept += [flag, AsTyped(value)]
        else:
            kept.append(word)
    return kept


def plain_texts_(settings: Any) -> Any:
    """What the parser made of `keep_texts`, with ordinary texts in it: YAML does not know how to write others."""
    if isinstance(settings, AsTyped):
        return str(settings)
    inside = vars(settings) if isinstance(settings, jsonargparse.Namespace) else settings
    if isinstance(inside, dict):
        inside.update({name: plain_texts_(value) for name, value in inside.items()})
    return settings


def _is_text(flag: str, value: str, kinds: Mapping[str, Any]) -> bool:
    """Whether a flag's value can be nothing but a text."""
    if isinstance(flag, AsTyped) or not flag.startswith("--"):
        return False
    *above, name = flag.removeprefix("--").split(".")
    inside = _kinds_at(above, kinds) if above else kinds
    kind = None if inside is None else inside.get(name)
    return kind is str or (set(typing.get_args(kind)) == {str, type(None)} and value != "null")


def check_maps(content: Mapping[str, Any], kinds: Mapping[str, Any], above: str = "") -> None:
    """Refuse anything but a map where a dataclass is asked for.

    Raises:
        SettingError: a list, a text or a number stands where a map has to.
    """
    for name, value in content.items():
        inside = _kinds_at([name], kinds)
        if inside is None or isinstance(value, str) or (value is None and type(None) in typing.get_args(kinds[name])):
            continue  # a text is the name of a file
        if not isinstance(value, dict):
            raise SettingError(f"{above}{name} is settings with names ({', '.join(inside)}); got {shown(value)}.")
        check_maps(value, inside, f"{above}{name}.")


def _kinds_at(path: Sequence[str], kinds: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fields of the dataclass at a dotted name, and their types; None where there is no dataclass."""
    found: Mapping[str, Any] | None = kinds
    for part in path:
        kind = None if found is None else found.get(part)
        made = next((one for one in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(one)), None)
        found = None if made is None or typing.get_origin(kind) is tuple else typing.get_type_hints(made)
    return found


def _unknown_flag(message: str, known: Sequence[str]) -> str | None:
    found = re.match("unrecognized arguments: (.+)", message)
    flags = [word.partition("=")[0] for word in found[1].split() if word.startswith("--")] if found else []
    if not flags:
        return None
    name = flags[0].removeprefix("--")
    endings = {item: item.rpartition(".")[2] for item in known}  # what people remember of a long name
    alike = difflib.get_close_matches(name.rpartition(".")[2], endings.values(), n=1, cutoff=0.6)
    near = difflib.get_close_matches(name, [item for item in known if endings[item] in alike], n=3, cutoff=0.0)
    likeness = [difflib.SequenceMatcher(None, item, name).ratio() for item in near]
    near = [item for item, alikeness in zip(near, likeness, strict=True) if alikeness > likeness[0] - 0.1]
    hint = f" Did you mean {' or '.join(f'--{item}' for item in near)}?" if near else ""
    return f"Unknown flag {flags[0]}.{hint}"


def _unknown_part(message: str, _: Sequence[str]) -> str | None:
    """A wrong name inside a list, or inside settings that may be null, whose names the parser does not list."""
    found = re.search(r"Problem with given class_path '(.+)':\s+Option '(.+)' is not accepted", message)
    if found is None:
        return None
    package, _, kind = found[1].rpartition(".")
    allowed = [item.name for item in dataclasses.fields(getattr(importlib.import_module(package), kind))]
    return str(unknown_name(f"setting of {'.'.join(_keys(message))}", found[2], allowed))


def _unknown_setting(message: str, known: Sequence[str]) -> str | None:
    found = re.search(r"(?:Group '(.+)' does not accept option|Option) '(.+?)'", message)
    if found is None:
        return None
    above = ""
    for part in ".".join(filter(None, found.groups())).split("."):
        beside = _names_below(above, known)
        if part not in beside:
            return str(unknown_name(f"setting of {above[:-1]}" if above else "setting", part, beside))
        above += f"{part}."
    return None


def _missing(message: str, _: Sequence[str]) -> str | None:
    found = re.search(r"the following arguments are required: (.+)", message)
    if found is None:
        return None
    above = "".join(f"{key}." for key in _keys(message))
    return f"Required, but not given: {', '.join(above + name for name in found[1].split(', '))}."


def _no_file(message: str, known: Sequence[str]) -> str | None:
    group = re.match(r"""Parser key "(.+)":\nUnable to load config '(.+)'(?:\n  - (?!Parser key)((?s:.+)))?""", message)
    if group:
        flags = ", ".join(f"--{group[1]}.{name}" for name in _names_below(f"{group[1]}.", known))
        reason = f" ({' '.join(group[3].split())})" if group[3] else ""
        return f"--{group[1]} is a YAML file with settings; got {group[2]!r}{reason}. A single setting: {flags}."
    told = re.fullmatch(r'Parser key "(.+)": (.+)', message)
    return f"--{told[1]}: {told[2]}" if told else None


def _wrong_value(message: str, _: Sequence[str]) -> str | None:
    lines = message.splitlines()
    keys = [(place, len(found["indent"])) for place, found in enumerate(map(_KEY.match, lines)) if found]
    if not keys or any(outer >= inner for (_, outer), (_, inner) in itertools.pairwise(keys)):
        return None  # in the second case: several things that it might have been, each with a mistake of its own
    place, depth = keys[-1]
    about = [line for line in lines[place + 1 :] if len(line) - len(line.lstrip()) > depth]
    allowed = dict.fromkeys(words for line in about for words in _allowed(line))
    values = [found[1] for found in (re.search(r"(?:Got|Given) value: (.*)", line) for line in about) if found]
    if not allowed or not values:
        return None
    of_words = (
        "a list" in allowed
        and _keys(message)[-1].rpartition(".")[2] not in _OF_SETTINGS
        and values[0][:1] not in ("[", "{")
    )
    as_list = f" Write '[{values[0]}]'." if of_words else ""
    return f"{'.'.join(_keys(message))} is {' or '.join(allowed)}; got {values[0]}.{as_list}"


_OF_SETTINGS = ("stages", "terms", "mixture")
"""Settings that are lists of others."""


def _allowed(line: str) -> Iterator[str]:
    """What a line of the parser says is expected, in words."""
    if found := re.search(r"Expected a typing\.Literal\[(.+?)\]", line):
        yield "one of " + found[1].replace("'", "")
    elif found := re.search(r"Expected a <class '(?:.+\.)?(\w+)'>", line):
        yield KINDS.get(found[1], f"a {found[1]}")
    elif found := re.search(r"Not a valid subclass of (\w+)", line):
        yield f"the settings of a {found[1]}"


def _keys(message: str) -> list[str]:
    """Names of the settings that a message is about, from the outside in."""
    return [found["name"] for found in map(_KEY.match, message.splitlines()) if found]


def _names_below(above: str, known: Iterable[str]) -> list[str]:
    """The next part of those names that begin with `above`, which ends with a dot or is empty."""
    return list(dict.fromkeys(item[len(above) :].partition(".")[0] for item in known if item.startswith(above)))
