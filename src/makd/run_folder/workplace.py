"""Station 9: the hidden folder in which a result is made, and that one process at a time may work in.

It stands beside the output, on the same disk, so that the result can be renamed into place. A folder of that name
without makd's mark is somebody else's and is left alone.
"""

import json
import os
import platform
import shutil
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from makd.errors import OutputError
from makd.whole_files import write_whole

MARK, LOCK = "made-by-makd.json", "lock"
RESULT, UNPLACED = "result", "unplaced"
"""The result; and a note that it is finished, but could not be renamed into place."""
REPLACED = "replaced"
"""What was in the output's place, for the moment between two renames."""
KINDS = ("checkpoints", "factorization", "cache")
"""Unfinished work that a later run can go on with."""
_ATTEMPTS = 5
"""How often to begin again where another process ended in between."""


class Workplace:
    """A hidden folder beside an output."""

    def __init__(self, output: Path) -> None:
        """Only finds its name; nothing is made yet."""
        self.output = output
        self.path = output.parent / f".{output.name}.makd"
        self._lock = FileLock(self.path / LOCK)

    def enter(self) -> None:
        """Make the folder, or take what an earlier run left, and keep others out.

        Raises:
            OutputError: another process is at work there, or the folder is not makd's.
            OSError: the folder cannot be made.
        """
        for _ in range(_ATTEMPTS):
            self.path.mkdir(parents=True, exist_ok=True)
            inside = {path.name for path in self.path.iterdir()}
            if not inside <= {LOCK} and MARK not in inside:
                raise OutputError(
                    f"{self.path} is in the way: makd works in a folder of that name, and did not make this one. Move "
                    "it, or name another output."
                )
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise OutputError(
                    f"{self._owner()} is making {self.output}. Wait for it, or name another output."
                ) from error
            except FileNotFoundError:
                continue
            if (self.path / LOCK).is_file():
                break
            self._lock.release()  # of a folder that another process has just removed
        else:
            raise OutputError(f"{self.path} comes and goes: other processes make {self.output}. Name another output.")
        self._mark()

    def leave(self) -> None:
        """Let others in; the folder goes, unless there is something in it to go on with or to save."""
        is_open_kept = os.name == "nt"  # there a file that is open cannot be removed
        with suppress(OSError):  # what is left is makd's, and the next run takes it up
            if not self.unfinished():
                for name in self._inside() - {LOCK, MARK}:
                    remove(self.path / name)
                (self.path / MARK).unlink(missing_ok=True)
                if not is_open_kept:
                    (self.path / LOCK).unlink(missing_ok=True)
        self._lock.release()
        with suppress(OSError):
            if is_open_kept and self._inside() == {LOCK}:
                (self.path / LOCK).unlink()
            if not self._inside():
                self.path.rmdir()

    def unfinished(self) -> list[str]:
        """Names of the folders in here that hold something to go on with, or to save."""
        kept = (*KINDS, REPLACED, *([RESULT] if (self.path / UNPLACED).is_file() else []))
        folders = (self.path / name for name in kept)
        return [path.name for path in folders if path.is_dir() and any(path.iterdir())]

    def rehearse(self) -> None:
        """Do once, with nearly nothing, what will be done with the result.

        Raises:
            OSError: some step is not possible here.
        """
        trial = self.path / "trial"
        shutil.rmtree(trial, ignore_errors=True)
        trial.mkdir()
        with (trial / "model.safetensors").open("wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
        (trial / "model.safetensors").unlink()
        if self.output.exists():  # a kill in between is mended by the next run
            self.output.rename(self.path / REPLACED)
            (self.path / REPLACED).rename(self.output)
        else:
            trial.rename(self.output)
            self.output.rename(trial)
        trial.rmdir()

    def _inside(self) -> set[str]:
        return {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()

    def _mark(self) -> None:
        content = {
            "output": str(self.output), "process": os.getpid(), "host": platform.node(),
            "since": datetime.now().isoformat(timespec="seconds"),
        }  # fmt: skip
        (self.path / MARK).touch()
        write_whole(self.path / MARK, json.dumps(content))

    def _owner(self) -> str:
        """Who is at work, as its mark says."""
        try:
            known: dict[str, Any] = json.loads((self.path / MARK).read_text(encoding="utf-8"))
            return f"Another run (process {known['process']} on {known['host']}, since {known['since']})"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return "Another run"


def remove(path: Path) -> None:
    """Remove a file, a link or a folder that makd made."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
