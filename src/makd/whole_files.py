"""Files that are whole at any moment, after a power cut too, and digests of files. Stands below all."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

SYSTEM = os.name
"""`nt` is Windows."""


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path`, and put it there when it is on disk: who reads finds the old content or the new."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def sync_file(path: Path) -> None:
    """What `path` holds is on disk when this returns.

    Windows syncs files alone that are open for writing; elsewhere one that may only be read can be synced too.
    """
    with path.open("r+b" if SYSTEM == "nt" else "rb") as file:
        os.fsync(file.fileno())


def write_json_whole(path: Path, content: Any) -> None:
    """`content`, which JSON knows, as indented JSON: see `write_whole`."""
    write_whole(path, json.dumps(content, indent=2))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, a piece at a time."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()
