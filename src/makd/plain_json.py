"""JSON as makd reads it from files that others may have changed: one way in, one message. Stands below all stations."""

import json
from pathlib import Path
from typing import Any

from makd.errors import MakdError

KINDS: dict[type[Any], str] = {dict: "an object, {...}", list: "a list, [...]"}
"""What a file may have to hold, as people call it."""


def read_json(path: Path, kind: type[Any], wrong: type[MakdError], advice: str) -> Any:
    """The content of a JSON file.

    Args:
        path: of the file.
        kind: what it has to hold: `dict` or `list`.
        wrong: type of the error if it does not.
        advice: what to do then: a sentence.

    Raises:
        MakdError: `wrong`: it is not there, not UTF-8, not JSON, lists in it lie too deep, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise wrong(f"{path} cannot be read: {error.strerror}. {advice}") from error
    except (ValueError, RecursionError) as error:
        raise wrong(f"{path} is damaged: it is not JSON ({error}). {advice}") from error
    if not isinstance(content, kind):
        found = "null" if content is None else type(content).__name__
        raise wrong(f"{path} holds {KINDS[kind]}; this one is {found}. {advice}")
    return content
