"""Station 9: what stands beside a student's weights in its folder, for another folder that is made of it."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from makd.report.manifest import MANIFEST
from makd.report.speed import BENCH_FILE

RECORDS = ("recipe.yaml", "metrics.json", "environment.json", "README.md")
"""What a run tells of its student."""
_OF_THE_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    BENCH_FILE,
    MANIFEST,
    "*.partial",
    "checkpoints",
)


def copy_beside(source: Path, result: Path, without: Iterable[str] = ()) -> None:
    """Copy what stands beside the weights of a student: tokenizer, records of the run, card, pooling.

    Args:
        source: folder of the student.
        result: folder that gets the files.
        without: names of files that it does not get.
    """
    ignored = shutil.ignore_patterns(*_OF_THE_WEIGHTS, *without)

    def ignore(folder: str, names: list[str]) -> set[str]:  # a subfolder's files are of other modules than the model
        return ignored(folder, names) if Path(folder) == source else set()

    shutil.copytree(source, result, ignore=ignore, dirs_exist_ok=True)
