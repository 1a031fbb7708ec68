"""The file that a report becomes: tried before the work, whole at the end, in the place of no other file."""

import os
import secrets
from pathlib import Path

from makd.errors import OutputError

MARK = '<meta name="generator" content="makd report">'
"""By which a report is known."""
_HEAD = 2000
"""Letters among which it stands."""


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse to write a report to a `path` that holds something else.

    Raises:
        OutputError: there is something else, or a report and `overwrite` is off; or its folder is not there.
    """
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder. Name a file, such as {path / 'report.html'}.")
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as file:
                is_own = MARK in file.read(_HEAD)
            if not is_own:
                raise OutputError(
                    f"{path} is there, and no report that makd wrote. It is not replaced: name another file."
                )
            if not overwrite:
                raise OutputError(f"{path} exists. Name another file, or replace it with --overwrite.")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}. Name another file.") from error


def write_target(path: Path, text: str) -> None:
    """Put a report in its place, whole at any moment.

    Raises:
        OutputError: `path` cannot be written.
    """
    part = path.with_name(f".makd-{secrets.token_hex(8)}.html")
    try:
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}. Name another file.") from error
