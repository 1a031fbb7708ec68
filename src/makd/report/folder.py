"""Station 9: where a student is written. The folder appears whole or not at all, and replaces nothing unasked."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from makd.errors import OutputError


class OutputFolder:
    """A folder that will hold a result. Until it is done the work stands in `<name>.partial` beside it."""

    def __init__(self, path: Path, overwrite: bool = False, resume: bool = False) -> None:
        """Check early that the result can be written.

        Raises:
            OutputError: the folder is not empty and `overwrite` is off, or is a file, or cannot be made; or there is
                nothing to resume.
        """
        self.path = path.expanduser().absolute()
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.overwrite = overwrite
        self.resume = resume
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{path} is a file; the output is a folder. Name another one.")
        if self.path.is_dir() and any(self.path.iterdir()) and not overwrite:
            raise OutputError(f"{path} exists and is not empty. Name another output, or replace it with --overwrite.")
        if resume and not self.checkpoints.is_dir():
            raise OutputError(
                f"There is nothing to resume: {self.checkpoints} does not exist. Checkpoints are kept with "
                "training.save_every; leave out --resume to start anew."
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.path.parent} cannot be made: {error}.") from error

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer keeps its checkpoints while the work goes on."""
        return self.partial / "checkpoints"

    @contextmanager
    def work(self, keep: bool = False) -> Iterator[Path]:
        """A folder to write into; at the end of the block it becomes `path`. On an error `path` is as it was.

        What an unfinished run left is removed, but for checkpoints: those stay until a run finishes or starts anew.
        With `keep` all of `partial` stays, and its owner knows whether it can go on with it.
        """
        if not (self.resume or keep) and self.partial.exists():
            shutil.rmtree(self.partial)
        result = self.partial / "result"
        shutil.rmtree(result, ignore_errors=True)
        result.mkdir(parents=True)
        try:
            yield result
        except BaseException:
            if not (keep or self.checkpoints.is_dir()):
                shutil.rmtree(self.partial, ignore_errors=True)
            elif keep:
                shutil.rmtree(result, ignore_errors=True)
                if not any(self.partial.iterdir()):
                    self.partial.rmdir()
            raise
        self._put_in_place(result)

    def _put_in_place(self, result: Path) -> None:
        old = self.path.with_name(self.path.name + ".old")
        if self.path.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.path.rename(old)
        result.rename(self.path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.partial, ignore_errors=True)
