"""Named things of one kind (solvers, rank rules, aspects, plans), with one error text for a name that nobody knows."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from makd.errors import UnknownNameError

T = TypeVar("T")


def unknown_name(kind: str, name: object, known: Iterable[object]) -> UnknownNameError:
    """The error for `name`, which is none of the names in the iterable `known`; offers the nearest."""
    names = [str(item) for item in known]
    near = difflib.get_close_matches(str(name), names, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(item) for item in near)}?" if near else ""
    return UnknownNameError(f"Unknown {kind} {str(name)!r}.{hint} Known: {', '.join(names)}.")


def make_settings(kind: Callable[..., T], called: str, values: Mapping[str, Any]) -> T:
    """The settings dataclass `kind` of what a file holds of it, whose lists are tuples here.

    Raises:
        UnknownNameError: it has no such setting.
    """
    known = inspect.signature(kind).parameters
    for name in values:
        if name not in known:
            raise unknown_name(called, name, known)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


class Registry(Mapping[str, T], Generic[T]):
    """A read-only table of named things; looking up an unknown name offers the nearest known ones."""

    def __init__(self, kind: str, items: Mapping[str, T]) -> None:
        self.kind = kind
        self._items = dict(items)

    def __getitem__(self, name: str) -> T:
        """The thing called `name`.

        Raises:
            UnknownNameError: nothing is called so.
        """
        if name not in self._items:
            raise unknown_name(self.kind, name, self)
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
