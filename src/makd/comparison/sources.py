"""Station 10: whether cells that are done are of the weights and the text that there are now.

Settings name paths. Where a teacher is fine-tuned anew in its folder, or rows are added to a file, the settings stay as
they are, and a table would have cells of both without a word. So the first run into a folder notes a hash of what it
read from this machine's paths, and every other is held to it. What a hub id names is taken to stay.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from makd.comparison.results import append_line, read_lines
from makd.data.folders import data_files
from makd.errors import ModelLoadError, OutputError
from makd.loading import locate
from makd.whole_files import file_digest

SOURCES_FILE = "sources.jsonl"
"""In the output folder: a line for each path."""
_OF_A_MODEL = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".txt", ".model", ".py")
"""What weights, settings and tokenizers lie in."""


def check_sources(folder: Path, models: Iterable[str | None], data: Mapping[str, str]) -> None:
    """Refuse other weights or another text than what lines in `folder` are of; note what is new to it.

    Args:
        folder: of the results.
        models: names of teachers and tokenizers; None is skipped.
        data: paths of text as the settings name them -> where they are on this machine. A text is held to its name, so
            that another folder of data is seen, and the same text elsewhere is the same.

    Raises:
        OutputError: what stands at a path is something else than it was.
    """
    named = {name: _model_files(name) for name in models if name}
    named |= {name: _text_files(place) for name, place in data.items()}
    noted = folder / SOURCES_FILE
    known = {line["path"]: line["sha256"] for line in read_lines(noted)}
    new = {}
    for name, files in named.items():
        inside = [path for path in files if not path.absolute().is_relative_to(folder.absolute())]
        if not inside:
            continue
        found = _hash(inside)
        if name not in known:
            new[name] = found
        elif known[name] != found:
            raise OutputError(
                f"{data.get(name, name)} is not what {name} was when results in {folder} were begun: there are other "
                f"files, and cells of both would stand in one table. Name another output; or take its line out of "
                f"{noted}, if the change is none to the cells that are done."
            )
    for name, found in new.items():
        append_line(noted, {"path": name, "sha256": found})


def _model_files(name: str) -> list[Path]:
    """Files on this machine that a model or tokenizer is read from; none of a hub id."""
    try:
        place = locate(name)
    except ModelLoadError:  # what is not there is told where it is read
        return []
    if place.gguf_file is not None:
        return [Path(place.folder) / place.gguf_file]
    root = Path(place.folder)
    if not root.is_dir():
        return []
    found = [*root.glob("*"), *root.glob("[0-9]_*/*.json")]  # parts of a sentence encoder have folders of their own
    return sorted(path for path in found if path.is_file() and path.suffix in _OF_A_MODEL)


def _text_files(name: str) -> list[Path]:
    """Files on this machine that rows are read from; none of a hub id or of the built-in text."""
    path = Path(name).expanduser()
    return data_files(path) if path.is_dir() else [path] if path.is_file() else []


def _hash(files: Sequence[Path]) -> str:
    """SHA-256 of the names of files and of all that is in them."""
    found = hashlib.sha256()
    for path in files:
        found.update(f"{path.name} {file_digest(path)}\n".encode())
    return found.hexdigest()
