"""Station 9: a single file of measurements. Tried before the work, whole at the end, it replaces nothing unasked."""

import os
import secrets
import stat
from pathlib import Path
from typing import Any

from makd.errors import OutputError
from makd.processes.first import from_first, in_first
from makd.report.record import write_json


class OutputFile:
    """A JSON file that will be written when all is measured."""

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        """Check early that the file can be written; missing folders are made.

        Raises:
            OutputError: it is there and `overwrite` is off, is a folder, or cannot be written.
        """
        self.path = Path(os.path.realpath(Path(path).expanduser()))
        from_first(lambda: self._rehearse(str(path), overwrite))

    @in_first
    def write(self, content: Any) -> None:
        """Put `content` into the file, which is whole at any moment.

        Raises:
            OutputError: it cannot be written any more.
        """
        try:
            part = self._begin()
            try:
                write_json(part, content)
                with part.open("rb") as file:
                    os.fsync(file.fileno())
                part.replace(self.path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error.strerror or error}.") from error

    def _rehearse(self, given: str, overwrite: bool) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._check(given, overwrite)
            self._begin().unlink()
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{given} cannot be written: {error.strerror or error}. Name another file.") from error

    def _check(self, given: str, overwrite: bool) -> None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return
        if not stat.S_ISREG(found.st_mode):
            raise OutputError(f"{given} is there and no file. Name one.")
        if not overwrite:
            raise OutputError(f"{given} exists. Name another file, or replace it with --overwrite.")

    def _begin(self) -> Path:
        """An empty file beside the one that it will be."""
        part = self.path.with_name(f".makd-{secrets.token_hex(8)}.json")
        part.touch(exist_ok=False)
        return part
