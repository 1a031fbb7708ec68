"""Station 3: the folder that keeps what is done of a factorization, for a process that goes on after a kill.

It knows what it is the work of: teacher, text, budget and settings. Work of something else is not gone on with.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from makd.calibration.store import DiskStore
from makd.errors import OutputError
from makd.identities import VERSIONS, differences, versions, warn_other_versions
from makd.plain_json import read_json
from makd.whole_files import write_json_whole

logger = logging.getLogger(__name__)

IDENTITY = "work.json"


@dataclass(frozen=True)
class Work:
    """Where a factorization keeps what is done; the folder is made when something is kept."""

    path: Path
    identify: Callable[[], Mapping[str, Any]] = dict
    """Gives all that the student depends on, as JSON knows it."""
    anew: bool = False
    """Whether the work of something else may be thrown away."""

    def store(self, part: str = "") -> DiskStore:
        """The store of one part of the work, in a folder of its own; without a name, the folder itself.

        Raises:
            OutputError: the folder holds the work of another teacher, of other settings, or of something else.
        """
        return DiskStore(self._claimed / part)

    @cached_property
    def _claimed(self) -> Path:
        """The folder, begun, or with what a run of the same has left there."""
        found = self.path / IDENTITY
        wanted = json.loads(json.dumps({**self.identify(), VERSIONS: versions()}))
        if self.anew and found.is_file() and not _is_same(found, wanted):
            shutil.rmtree(self.path)
        if found.is_file():
            known = read_json(found, dict, OutputError, f"Remove {self.path} to start anew.")
            _compare(self.path, known, wanted)
            logger.info("what a run of the same left in %s is gone on with", self.path)
            warn_other_versions(known, wanted, "The factorization")
            return self.path
        if self.path.is_dir() and set(self.path.iterdir()) - {found.with_name(found.name + ".part")}:
            raise OutputError(
                f"{self.path} holds the unfinished work of something else, not of a factorization. Finish it, remove "
                "the folder, or name another output."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        write_json_whole(found, wanted)
        return self.path


def _is_same(found: Path, wanted: Mapping[str, Any]) -> bool:
    try:
        return not differences(dict(json.loads(found.read_text(encoding="utf-8"))), wanted, (VERSIONS,))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _compare(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    unlike = differences(found, wanted, (VERSIONS,))
    if unlike:
        name, one, other = unlike[0]
        raise OutputError(
            f"{path} holds the unfinished work of another run: its {name} is {one}, this one's is {other}. Give the "
            "settings of that run to continue it, start anew with --overwrite, or name another output."
        )
