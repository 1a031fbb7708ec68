"""Station 10: results as JSON lines, one a cell, which a killed process leaves readable."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from makd.errors import OutputError
from makd.run_folder import to_json


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of `path`; none if it is not there. A last line that was cut off is left out.

    Raises:
        OutputError: another line is not JSON.
    """
    if not path.is_file():
        return []
    found = []
    *whole, _unfinished = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(whole, start=1):
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise OutputError(
                f"{path}, line {number} is not JSON. Take that line out; its cell is run again."
            ) from error
    return found


def append_line(path: Path, content: Mapping[str, Any]) -> None:
    """Add a line to `path`, on disk when this returns; what a killed process left unfinished at the end is cut off.

    Processes that write to the same file wait for each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")), path.open("a+b") as file:
        file.seek(0)
        text = file.read()
        file.truncate(text.rfind(b"\n") + 1)
        file.write((to_json(content) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
