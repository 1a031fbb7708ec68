"""Station 2: whether `datasets` reads all of a folder. It takes one format, and names of splits if any."""

from collections.abc import Iterable
from pathlib import Path

from datasets import load_dataset_builder

from makd.errors import DataError

DATA = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".txt", ".xml")
"""What text may lie in. The same compressed: with one more suffix."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip")
ABOUT = (
    "readme",
    "license",
    "licence",
    "notice",
    "citation",
    "changelog",
    "requirements",
    "dataset_info",
    "dataset_dict",
    "state.json",
)
"""How names of files begin that are about the data."""


def check_whole(folder: Path, configuration: str | None = None) -> None:
    """Refuse a `folder` of which some data files would be read, in one split or another, and others not.

    A README with a list of configurations says itself what belongs together: there nothing is checked.

    Raises:
        DataError: some data files would be left out.
    """
    card = folder / "README.md"
    if card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace"):
        return
    files = load_dataset_builder(str(folder), configuration).config.data_files or {}
    read = {Path(file).resolve() for split in files.values() for file in split if "::" not in str(file)}
    left = [path for path in data_files(folder) if path.resolve() not in read]
    if read and left:
        raise DataError(
            f"Only a part of {folder} would be read: {_names(read, folder.resolve())}, but not {_names(left, folder)}. "
            "A folder is read where all its files have one format, and names that begin with train, validation or test "
            "if any has. Convert or rename them, move what does not belong to it elsewhere, or give one file."
        )


def data_files(folder: Path) -> list[Path]:
    """Files in `folder` that look like data, in order, at any depth."""
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
        hidden = any(part.startswith((".", "__")) for part in inside)
        if path.is_file() and suffix.lower() in DATA and not hidden and not path.name.lower().startswith(ABOUT):
            found.append(path)
    return found


def _names(paths: Iterable[Path], folder: Path) -> str:
    """The first few, as they stand in the folder."""
    names = sorted(str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path) for path in paths)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
