"""Rows that are made of rows, kept on disk for the next run that makes the same.

`datasets` finds them again by what the function is, and takes another module's code for what its name says. So makd's
own code and the versions of what reads texts are part of it: rows of an older makd, or of another tokenizers, are made
anew.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from datasets import Dataset

_READERS = ("datasets", "tokenizers", "transformers", "jinja2")
"""Packages that say what becomes of a text."""


def map_rows(rows: Dataset, function: Callable[..., Any], **settings: Any) -> Dataset:
    """`rows.map` of a function of makd's."""
    return rows.map(_VersionedFunction(function, code_digest()), **settings)


def filter_rows(rows: Dataset, function: Callable[..., bool], **settings: Any) -> Dataset:
    """`rows.filter` of a function of makd's."""
    return rows.filter(_VersionedFunction(function, code_digest()), **settings)


@dataclass(frozen=True)
class _VersionedFunction:
    """A function, with what else its results hang on."""

    function: Callable[..., Any]
    code: str

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return self.function(*args, **settings)


@functools.cache
def code_digest() -> str:
    """Says whether rows were made by this code: makd's own, and the versions of `_READERS`."""
    found = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    for name in _READERS:
        try:
            found.update(f"{name} {version(name)}\n".encode())
        except PackageNotFoundError:
            continue
    return found.hexdigest()[:16]
