"""Station 9: where a student is written. The folder appears whole or not at all, and replaces nothing unasked."""

import errno
import logging
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from makd.distill.resuming.checkpoints import checkpoint_folders, find_fault, newest_step
from makd.errors import MakdError, OutputError, SettingError
from makd.processes.first import from_first
from makd.processes.started import is_first
from makd.run_folder.manifest import foreign_files, write_manifest
from makd.run_folder.workplace import KINDS, REPLACED, RESULT, UNPLACED, Workplace, remove
from makd.whole_files import sync_file

_logger = logging.getLogger(__name__)

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
"""What ails a disk, not a program."""
_FULL = ("No space left", "os error 28", "Disk quota exceeded")
"""The same in the words of libraries that pass no number on."""


class OutputFolder:
    """A folder that will hold a result. Until it is done the work stands in a hidden folder beside it, `.NAME.makd`.

    As a context manager it keeps other runs out from the first check to the last rename. Whatever ends the block,
    nothing is removed that makd did not make. Of a run's processes the first alone touches anything.
    """

    def __init__(
        self,
        path: Path,
        overwrite: object = False,
        resume: object = False,
        inputs: Iterable[str | Path | None] = (),
        kinds: Collection[str] = ("checkpoints",),
    ) -> None:
        """Nothing is looked at before the block begins.

        Args:
            path: of the folder.
            overwrite: whether a folder that makd made may be replaced, and checkpoints be thrown away.
            resume: whether to go on from the checkpoints of an earlier run.
            inputs: what the run reads; names that are no paths are passed over.
            kinds: which unfinished work of an earlier run (`KINDS`) this one may go on with: checkpoints if `resume`
                says so; a factorization unasked; likewise a cache, which is the result itself while it grows.

        Raises:
            SettingError: a switch is neither true nor false.
        """
        absolute = path.expanduser().absolute()
        is_roundabout = os.path.islink(absolute) or ".." in absolute.parts
        self.path = Path(os.path.realpath(absolute)) if is_roundabout else absolute
        self._is_dangling = os.path.islink(absolute) and not os.path.exists(absolute)
        self.overwrite = _switch("overwrite", overwrite)
        self.resume = _switch("resume", resume)
        self._given = path
        self._inputs = [there for name in inputs if name is not None and (there := _existing(name)) is not None]
        self._kinds = frozenset(kinds)
        self._told_what_stays = False
        self._place = Workplace(self.path)

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer keeps its checkpoints while the work goes on."""
        return self._place.path / "checkpoints"

    @property
    def identity(self) -> Path:
        """File that says which run the checkpoints are of."""
        return self._place.path / "run.json"

    @property
    def factorization(self) -> Path:
        """Folder for what is done of a factorization, which stays when the run is stopped."""
        return self._place.path / "factorization"

    @property
    def factorization_bytes(self) -> int:
        """What an earlier run left of a factorization, in bytes."""
        return sum(path.stat().st_size for path in self.factorization.rglob("*") if path.is_file())

    @property
    def _result(self) -> Path:
        return self._place.path / ("cache" if "cache" in self._kinds else RESULT)

    def __enter__(self) -> "OutputFolder":
        """Try the whole way, before any work.

        Raises:
            OutputError: the result could not be written, would replace what makd did not make, or another process is
                at it; there are checkpoints and neither `resume` nor `overwrite`; or there is nothing to resume.
        """
        self.resume = from_first(self._enter)
        return self

    def _enter(self) -> bool:
        """Whether there are checkpoints to go on with, which the first process alone has looked for."""
        with self._told_early():
            self._check_place()
            self._place.enter()
        try:
            with self._told_early():
                self._put_back()
                self._check_replaced()
                self._check_unfinished()
                self._place.rehearse()
        except BaseException:
            self._place.leave()
            raise
        return self.resume

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_first():
            if error is not None and not isinstance(error, MakdError) and not self._told_what_stays:
                self._warn_what_stays()
            self._place.leave()

    def check_room(self, size: int) -> None:
        """Refuse to begin with what the disk has no room for.

        Args:
            size: bytes that will be written, about.

        Raises:
            OutputError: fewer bytes are free.
        """
        free = shutil.disk_usage(self._place.path).free
        if free < size:
            raise OutputError(
                f"{self.path} needs about {size / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} MB free. Make room, "
                "name an output on another disk, or keep no checkpoints (training.save_every)."
            )

    @contextmanager
    def work(self) -> Iterator[Path]:
        """A folder to write into; at the end of the block it becomes `path`. On an error `path` is as it was.

        The first process writes; at the end of the block the others wait until all is in its place.

        What an unfinished run left goes now, unless this one goes on with it: that stays until a run finishes.

        Raises:
            OutputError: the disk is full; or the result is finished and cannot be renamed, which leaves it where the
                error says.
        """
        with ExitStack() as stack:
            yield stack.enter_context(self._work()) if is_first() else self._result
            from_first(stack.pop_all().close)

    @contextmanager
    def _work(self) -> Iterator[Path]:
        going_on = {kind for kind in self._kinds if kind != "checkpoints" or self.resume}
        old = None if self.resume else newest_step(self.checkpoints)
        if old is not None:
            _logger.warning("the checkpoints of an earlier run, up to %s, are removed, as --overwrite says", old)
        for name in {*KINDS, RESULT, UNPLACED} - going_on:
            remove(self._place.path / name)
        if "checkpoints" not in going_on:
            remove(self.identity)
        result = self._result
        try:
            result.mkdir(exist_ok=True)
            yield result
            write_manifest(result)
            _sync(result)
        except BaseException as error:
            with suppress(OSError):
                remove(self._place.path / RESULT)
            stays = self._warn_what_stays()
            if _is_of_the_disk(error):
                raise OutputError(
                    f"{self._place.path} cannot be written to any more: {error}. Make room, and give the "
                    f"command again. {stays}".rstrip()
                ) from error
            raise
        self._put_in_place(result)

    @contextmanager
    def _told_early(self) -> Iterator[None]:
        """An error of the system's is one that the user can mend."""
        try:
            yield
        except OutputError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise OutputError(f"{self._given} cannot be written: {reason}. Name another output.") from error

    def _check_place(self) -> None:
        if self._is_dangling:
            raise OutputError(
                f"{self._given} is a link to {self.path}, which is not there. Make it, or name another output."
            )
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self._given} is a file; the output is a folder. Name another one.")
        if os.path.ismount(self.path):
            raise OutputError(
                f"{self._given} is where a disk is mounted, which nothing can take the place of. Name a folder in it, "
                f"such as {self.path / 'student'}."
            )
        if Path.cwd().is_relative_to(self.path.resolve()):
            raise OutputError(
                f"{self._given} is the folder that makd runs in, or one above it. Name a folder of its own for "
                "the output."
            )

    def _check_replaced(self) -> None:
        """Refuse an output in whose place something stands that may not go."""
        if not (self.path.is_dir() and any(self.path.iterdir())):
            return
        if not self.overwrite:
            raise OutputError(
                f"{self._given} exists and is not empty. Name another output, or replace it with --overwrite."
            )
        here = self.path.resolve()
        for there in self._inputs:
            if there.is_relative_to(here) or here.is_relative_to(there):
                relation = "is" if here == there else "holds" if there.is_relative_to(here) else "lies in"
                raise OutputError(
                    f"{self._given} {relation} {there}, which this run reads. It is not replaced: name another output."
                )
        self._check_own()

    def _check_own(self) -> None:
        foreign = foreign_files(self.path)
        if foreign:
            others = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise OutputError(
                f"{self._given} holds more than an output of makd: {foreign[0]}{others}. It is not replaced: move that "
                "away, or name another output."
            )

    def _check_unfinished(self) -> None:
        """Refuse what an earlier run left, unless it is gone on with or may go."""
        found, place = self._place.unfinished(), self._place.path
        if self.overwrite and not self.resume:
            return
        if RESULT in found:
            raise OutputError(
                f"{place / RESULT} is the finished result of an earlier run, which could not be put in its place. "
                f"Move it to {self.path}; or start anew with --overwrite."
            )
        others = [name for name in found if name in KINDS and name not in self._kinds]
        if others:
            raise OutputError(
                f"{place} holds the unfinished work of another command: {', '.join(others)}. "
                "Finish it, start anew with --overwrite, or name another output."
            )
        if "checkpoints" in self._kinds:
            self._check_checkpoints(newest_step(self.checkpoints), "factorization" in found)

    def _check_checkpoints(self, step: str | None, has_factors: bool) -> None:
        faults = [f"{path.name}: {find_fault(path)}" for path in checkpoint_folders(self.checkpoints)]
        if self.resume and step is None and has_factors:
            self.resume = False  # there is a start, or part of it, to go on with
            if faults:
                _logger.warning("no checkpoint is whole (%s): the training begins anew", "; ".join(faults))
        elif self.resume and step is None:
            told = f"no checkpoint there is whole ({'; '.join(faults)})" if faults else "it has no checkpoints"
            raise OutputError(
                f"There is nothing to resume in {self._place.path}: {told}. Checkpoints are kept with "
                "training.save_every; leave out --resume to start anew."
            )
        if step is not None and not self.resume:
            raise OutputError(
                f"{self.checkpoints} are those of a run that was stopped, up to {step}. Go on with it by --resume, "
                "start anew with --overwrite, which removes them, or name another output."
            )

    def _put_back(self) -> None:
        """After a kill between two renames: the old output is there again."""
        old, result = self._place.path / REPLACED, self._result
        if not old.is_dir():
            return
        if not self.path.exists():
            old.rename(self.path)
        elif result.is_dir() and any(result.iterdir()):
            raise OutputError(
                f"{old} was to be replaced by a run that was killed, and now {self.path} is there again. Move "
                "it where you want it."
            )
        else:
            remove(old)

    def _warn_what_stays(self) -> str:
        """Tell a person who stopped a run what of it stays; empty where nothing does."""
        self._told_what_stays = True
        stays = self._what_stays()
        if stays:
            _logger.warning("%s", stays)
        return stays

    def _what_stays(self) -> str:
        step = newest_step(self.checkpoints)
        if step is not None:
            return f"Checkpoints up to {step} stay in {self.checkpoints}; the same command with --resume goes on."
        with suppress(OSError):
            remove(self.checkpoints)
        for kind in self._kinds & set(self._place.unfinished()):
            return f"What is done stays in {self._place.path / kind}; the same command goes on."
        return ""

    def _put_in_place(self, result: Path) -> None:
        old = self._place.path / REPLACED
        try:
            if self.path.exists():
                self._check_own()  # hours may have passed
                self.path.rename(old)
            try:
                result.rename(self.path)
            except BaseException:
                if old.exists():
                    old.rename(self.path)
                raise
        except OSError as error:
            with suppress(OSError):
                (self._place.path / UNPLACED).touch()
            raise OutputError(
                f"The result is finished and stands in {result}, but could not be put in its place: {error} Move it to "
                f"{self.path}."
            ) from error
        for name in (REPLACED, *KINDS, self.identity.name):
            remove(self._place.path / name)


def _switch(name: str, value: object) -> bool:
    """A word such as "false" is true to Python: it must not replace anything."""
    if not isinstance(value, bool):
        raise SettingError(f"{name} is true or false; got {value!r}.")
    return value


def _existing(name: str | Path) -> Path | None:
    """The file or folder called `name`; None if it is none. An empty name is none, and not the working directory."""
    if not str(name):
        return None
    try:
        path = Path(name).expanduser().resolve()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _is_of_the_disk(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in _DISK) or any(words in str(error) for words in _FULL)


def _sync(folder: Path) -> None:
    """All files of `folder` are on disk when this returns."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync_file(path)
