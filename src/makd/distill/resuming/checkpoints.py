"""Station 7: which checkpoints of a training are whole.

The Trainer writes the files of a checkpoint one after the other, and takes what it does not find for what was never
there: without an optimizer's state it goes on with a new one. So a checkpoint that is whole gets a list of its files
with their digests, last of all; one that has no such list, or whose files are not those of its list, does not count.
"""

import json
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from makd.processes.first import wait_for_everyone
from makd.whole_files import file_digest, sync_file, write_json_whole

LIST = "whole.json"
"""Name of a file -> SHA-256 of its content."""
_FOLDER = re.compile(r"checkpoint-(\d+)")


class ListFiles(TrainerCallback):
    """Writes `LIST` when a checkpoint is on disk, with what each process has written of it."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer calls it after the last file of a checkpoint."""
        wait_for_everyone()
        if args.should_save:
            list_files(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def list_files(folder: Path) -> None:
    """Say that the checkpoint in `folder` is whole as it is. What is said is on disk when this returns."""
    digests = {}
    for path in _files(folder):
        sync_file(path)
        digests[path.relative_to(folder).as_posix()] = file_digest(path)
    write_json_whole(folder / LIST, digests)


def find_fault(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`; None if it is whole."""
    try:
        digests = json.loads((folder / LIST).read_text(encoding="utf-8"))
        wanted = sorted(digests.items())
    except FileNotFoundError:
        return "it was not written to its end"
    except (OSError, ValueError, AttributeError, RecursionError):
        return f"{LIST} is damaged"
    for name, known in wanted:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if file_digest(folder / name) != known:
            return f"{name} is damaged"
    return None


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints of a training in `folder`, whole or not, the newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _FOLDER.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """After how many steps it was written."""
    return int(checkpoint.name.partition("-")[2])


def newest_step(folder: Path) -> str | None:
    """Where a run can go on, as a person is told: `step 50`, or `step 50 of stage_2`; None where it cannot."""
    if not folder.is_dir():
        return None
    stages = sorted((path for path in folder.glob("stage_*") if path.is_dir()), key=_stage_number, reverse=True)
    for place in (*stages, folder):
        for checkpoint in checkpoint_folders(place):
            if find_fault(checkpoint) is None:
                return f"step {step_of(checkpoint)}" + (f" of {place.name}" if place != folder else "")
    return None


def _stage_number(folder: Path) -> int:
    number = folder.name.partition("_")[2]
    return int(number) if number.isdigit() else 0


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (LIST, f"{LIST}.part"))
