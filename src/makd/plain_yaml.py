"""YAML as makd reads and writes it, wherever it does: plain data, small, nothing twice. Stands below every station.

YAML can do more than settings need: aliases that multiply a few bytes into gigabytes, tags that stand for objects, a
key that is there twice, of which parsers keep the last. All of that is refused, with its line.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from makd.errors import SettingError
from makd.kinds import LARGEST, shown

LONGEST = 2**18
"""Bytes of a text."""
DEEPEST = 24
"""Lists and maps inside each other."""
CLASSES = ("class_path", "init_args", "dict_kwargs")
"""Keys by which a parser would import what a file names."""
_TAG = "tag:yaml.org,2002:"


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        SettingError: it is not there, not a file, not UTF-8, or not plain.
    """
    return load_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a file of settings.

    Raises:
        SettingError: it is not there, not a file, too long, or not UTF-8.
    """
    try:
        if not path.is_file():
            inside = Path(path) / "recipe.yaml"
            hint = f" such as {inside}" if inside.is_file() else ""
            raise SettingError(f"{path} is no file. Give a YAML file{hint}.")
        with path.open("rb") as file:
            content = file.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise SettingError(f"{path} has more than {LONGEST:,} bytes. Settings are short: is it another file?")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SettingError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}.") from error


def load_yaml(text: str, called: str = "YAML") -> Any:
    """What `text` holds: numbers, texts, true, false, null, lists, and maps with texts as keys.

    Raises:
        SettingError: it is not YAML, or has aliases, tags, a key twice, more than `LONGEST` bytes or `DEEPEST` levels.
    """
    if len(text) > LONGEST:
        raise SettingError(f"{called} has more than {LONGEST:,} characters. Settings are short: is it another file?")
    try:
        loader = _PlainLoader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = "" if mark is None else f", line {mark.line + 1}"
        raise SettingError(f"{called}{place}: {error.problem or error.context}.") from error
    except yaml.YAMLError as error:
        raise SettingError(f"{called}: {' '.join(str(error).split())[:200]}.") from error


def dump_yaml(content: Any) -> str:
    """`content`, plain data, as YAML of which `load_yaml` makes the same: the text `1e5` has quotes, as `yes` has."""
    text: str = yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)
    return text


class _PlainLoader(yaml.SafeLoader):
    """Refuses while it composes, before anything is built."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _refused(f"aliases (*{event.anchor}) are not read; write it out", event)
        if getattr(event, "tag", None) is not None:
            raise _refused(f"tags ({event.tag}) are not read; leave it out", event)
        self.depth += 1
        if self.depth > DEEPEST:
            raise _refused(f"more than {DEEPEST} levels inside each other", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag != f"{_TAG}str":
                raise _refused(f"names of settings are texts; got {shown(key.value)}", key)
            if key.value in CLASSES:
                raise _refused(f"{key.value} is not read: a file names no classes", key)
            if key.value in lines:
                raise _refused(f"{key.value!r} is there twice, first in line {lines[key.value]}; keep one", key)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: Any) -> Any:
        """No larger than settings have any: what takes them for numbers with a fraction would fail otherwise."""
        told = "a whole number has at most 64 bits; if it is a name, put quotes around it"
        try:
            number: int = super().construct_yaml_int(node)
        except ValueError as error:  # of more digits than Python reads
            raise _refused(told, node) from error
        if abs(number) > LARGEST:
            raise _refused(told, node)
        return number


def _refused(what: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=where.start_mark)


class _PlainDumper(yaml.SafeDumper):
    """Puts quotes around texts that YAML 1.1 or `_PlainLoader` would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always: they are not read."""
        return True


_PlainLoader.add_constructor(f"{_TAG}int", _PlainLoader.construct_yaml_int)
# dates stay texts; 1e-4 is a number, as in JSON and Python, though YAML 1.1 wants a point in it
_PlainLoader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in known if tag not in (f"{_TAG}timestamp", f"{_TAG}float")]
    for letter, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_FLOAT = (
    re.compile(
        r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
for _side in (_PlainLoader, _PlainDumper):
    _side.add_implicit_resolver(f"{_TAG}float", *_FLOAT)
