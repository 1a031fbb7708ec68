"""Tables that a user's own package adds to: solvers, aspects and anatomies, by entry points or by `register`.

An installed package offers a thing under a name in its entry points; it is imported when the name is asked for, and not
before. What is registered in Python is there for as long as the process. Names of makd's own cannot be taken.

Where a thing came from, and a digest of its code, is part of a run's identity: a run that another version of it began
is not gone on with.
"""

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from makd.errors import ExtensionError, MakdError
from makd.registry import Registry

T = TypeVar("T")

DIGITS = 12
"""Of a digest, in what is told and compared."""
_loaded: dict[str, str] = {}


def loaded() -> dict[str, str]:
    """What of users' packages this process has used: `solver 'name'` -> package, version and digest."""
    return dict(sorted(_loaded.items()))


class Extensible(Registry[T]):
    """A table of makd's own things, and of those that other packages add."""

    def __init__(
        self, kind: str, items: Mapping[str, T], group: str, accepts: type[T], why_not: Callable[[str, T], str | None]
    ) -> None:
        """Only what is makd's own is there at first.

        Args:
            kind: what a thing is called in texts.
            items: makd's own.
            group: of entry points that packages offer more in.
            accepts: what a thing has to be.
            why_not: of a user's thing and its name: what is wrong with it, None if nothing.
        """
        super().__init__(kind, items)
        self.group, self.accepts, self._why_not = group, accepts, why_not
        self.own = tuple(items)
        """Names of makd's own."""
        self._origins: dict[str, str] = {}

    def register(self, name: str, thing: T) -> T:
        """Add a user's thing, for as long as this process lives; the same name again is the thing's newer form.

        Every process of a run has to do so. A package that is installed offers it by an entry point instead.

        Raises:
            ExtensionError: the name is makd's own, or the thing is none of its kind.
        """
        if name in self.own:
            raise ExtensionError(f"{self.kind.capitalize()} {name!r} is makd's own. Take another name.")
        self._check(name, thing, "what was registered")
        module = inspect.getmodule(_function_of(thing) or type(thing))
        self._items[name] = thing
        self._origins[name] = f"registered in {getattr(module, '__name__', '?')} ({digest(thing)})"
        return thing

    def origin(self, name: str) -> str | None:
        """Package, version and digest of a user's thing; None for makd's own.

        Raises:
            UnknownNameError, ExtensionError: as for looking it up.
        """
        self[name]
        return self._origins.get(name)

    def __getitem__(self, name: str) -> T:
        """The thing called `name`.

        Raises:
            UnknownNameError: nothing is called so.
            ExtensionError: a package offers it, and it cannot be loaded or is none of its kind; or two offer it.
        """
        offers = self._offers(name)
        if offers and name in self.own:
            raise ExtensionError(
                f"{_teller(offers[0])} offers a {self.kind} {name!r}, which is the name of makd's own. Uninstall that "
                "package, or have it take another name."
            )
        if name not in self._items and offers:
            self._load(name, offers)
        thing = super().__getitem__(name)
        if name in self._origins:
            _loaded[f"{self.kind} {name!r}"] = self._origins[name]
        return thing

    def __contains__(self, name: object) -> bool:
        return name in self._items or (isinstance(name, str) and bool(self._offers(name)))

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._items, *(offer.name for offer in _offers(self.group, tuple(sys.path))))))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _offers(self, name: object) -> list[EntryPoint]:
        """Entry points of that name; a package that lies on the path twice offers once."""
        found = (offer for offer in _offers(self.group, tuple(sys.path)) if offer.name == name)
        return list({(one.value, one.dist.name if one.dist else ""): one for one in found}.values())

    def _load(self, name: str, offers: list[EntryPoint]) -> None:
        if len(offers) > 1:
            raise ExtensionError(
                f"Several packages offer a {self.kind} {name!r}: {'; '.join(map(_teller, offers))}. Uninstall all but "
                "one."
            )
        teller = _teller(offers[0])
        try:
            thing = offers[0].load()
        except MakdError:
            raise
        except Exception as error:  # importing somebody else's code fails with anything
            raise ExtensionError(
                f"{self.kind.capitalize()} {name!r} is of {teller}, which cannot be loaded: "
                f"{type(error).__name__}: {error}. Mend or uninstall that package."
            ) from error
        self._check(name, thing, teller)
        dist = offers[0].dist
        self._items[name] = thing
        self._origins[name] = f"{dist.name} {dist.version} ({digest(thing)})" if dist else f"? ({digest(thing)})"

    def _check(self, name: str, thing: object, teller: str) -> None:
        what = f"a {self.accepts.__module__.rpartition('.')[0] or self.accepts.__module__}.{self.accepts.__name__}"
        if not isinstance(thing, self.accepts):
            raise ExtensionError(f"{self.kind.capitalize()} {name!r} ({teller}) is {what}; got {type(thing).__name__}.")
        reason = self._why_not(name, thing)
        if reason is not None:
            raise ExtensionError(f"{self.kind.capitalize()} {name!r} ({teller}) cannot be taken: {reason}.")


@lru_cache(maxsize=16)
def _offers(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Entry points of a group, looked for once for each search path: names are looked up by the hundred."""
    return tuple(sorted(entry_points(group=group), key=lambda offer: offer.name))


def asked(what: str, function: Callable[..., T], *arguments: Any) -> T:
    """What a user's function returns for `arguments`; `what` is it called in the text of an error.

    Raises:
        ExtensionError: the function raised something.
    """
    try:
        return function(*arguments)
    except MakdError:
        raise
    except Exception as error:  # somebody else's code fails with anything
        raise ExtensionError(f"{what} failed: {type(error).__name__}: {error}") from error


def digest(thing: object) -> str:
    """Digits that change with the code of a thing's functions, and with what else it holds."""
    found = hashlib.sha256()
    for part in _parts(thing):
        found.update(part)
    return found.hexdigest()[:DIGITS]


def _parts(thing: object) -> Iterator[bytes]:
    if is_dataclass(thing) and not isinstance(thing, type):
        for field in fields(thing):
            yield field.name.encode()
            yield from _parts(getattr(thing, field.name))
    elif isinstance(thing, Mapping):
        for key, value in thing.items():
            yield from _parts(key)
            yield from _parts(value)
    elif isinstance(thing, frozenset | set):
        yield from sorted(repr(item).encode() for item in thing)
    elif isinstance(thing, tuple | list):
        for item in thing:
            yield from _parts(item)
    elif isinstance(thing, partial):
        yield from _parts((thing.func, thing.args, thing.keywords))
    elif callable(thing):
        yield _code(thing)
    else:
        yield repr(thing).encode()


def _code(function: Callable[..., Any]) -> bytes:
    """The file that a function is in; of one that was typed in, its own code."""
    try:
        return Path(inspect.getsourcefile(function) or "").read_bytes()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return b"" if code is None else code.co_code + repr((code.co_consts, code.co_names)).encode()


def _function_of(thing: object) -> Callable[..., Any] | None:
    values = [getattr(thing, field.name) for field in fields(thing)] if is_dataclass(thing) else [thing]
    functions = (value.func if isinstance(value, partial) else value for value in values)
    return next((value for value in functions if callable(value)), None)


def _teller(offer: EntryPoint) -> str:
    package = f"package {offer.dist.name} {offer.dist.version}" if offer.dist else "a package"
    return f"{package} ({offer.group}: {offer.name} = {offer.value})"
