"""Types of settings and arguments, as people call them, and whether a value is of one. Stands below every station.

Python does not look at annotations. Here they are held: `checked` does it for a dataclass of settings, `takes` for the
arguments of a function, so that "half" where a number belongs is told at once, and by name.
"""

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec, TypeVar

from makd.default_modes import default_modes
from makd.errors import SettingError

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "tuple": "a list",
    "list": "a list",
    "dict": "settings with names",
    "NoneType": "null",
}
"""Python's name of a type -> what people call it, who write YAML and flags."""

LARGEST = 2**63 - 1
"""Whole numbers beyond are no machine's."""
HALF = (
    "It holds half of a surrogate pair, as text has that was cut inside an emoji: write it with "
    "text.encode('utf-8', 'replace').decode(), or leave it out."
)
"""What is wrong with a text that is no Unicode."""
_WRONG = object()
_SHOWN = 80


def checked(called: str) -> Callable[[type[T]], type[T]]:
    """Hold the fields of a dataclass to their annotations before its own `__post_init__` looks at them.

    Stands below `@dataclass(frozen=True, kw_only=True)`. Fields are brought into one form: lists where tuples belong
    become tuples, `3` where a number belongs `3.0`, paths texts.

    Args:
        called: what errors call the settings: a wrong field is `called.field`.
    """

    def decorate(cls: type[T]) -> type[T]:
        own = cls.__dict__.get("__post_init__")

        def __post_init__(self: Any) -> None:
            owner: Any = type(self)
            for name, kind in _annotations(owner).items():
                object.__setattr__(self, name, fit(getattr(self, name), kind, f"{called}.{name}"))
            if own is not None:
                own(self)

        cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
        return cls

    return decorate


def takes(function: Callable[P, R]) -> Callable[P, R]:
    """Hold the arguments of a public function to their annotations, and run it in torch's `default_modes`.

    Raises:
        SettingError: one is of another kind.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        kinds = _annotations(function)
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise SettingError(f"{function.__name__}: {error}. It takes {', '.join(signature.parameters)}.") from error
        for name, value in given.arguments.items():
            if name in kinds and signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD:
                given.arguments[name] = fit(value, kinds[name], f"{name} of {function.__name__}")
        with default_modes():
            return function(*given.args, **given.kwargs)

    return held


def fit(value: object, kind: Any, called: str) -> Any:
    """`value`, in the form that what is annotated as `kind` has.

    Numbers are finite, and whole ones have 64 bits; texts are such as files can hold.

    Args:
        value: what was given.
        kind: a type of `KINDS`, a class, a union, a `Literal`, or a list, tuple or dict of these.
        called: what an error calls it.

    Raises:
        SettingError: it is of another kind.
    """
    made = _as(value, kind)
    if made is _WRONG:
        named = name_kind(kind)
        if isinstance(value, float):  # a number, and none that a setting may have
            named = named.replace(KINDS["float"], "a finite number")
        raise SettingError(f"{called} is {named}; got {shown(value)}.{_what_is_inside(value)}")
    return made


def _what_is_inside(value: object) -> str:
    """What to give in the place of a model that something is wrapped around."""
    if hasattr(value, "_orig_mod"):
        return " Give what torch.compile was given: `model._orig_mod`."
    if hasattr(value, "merge_and_unload"):
        return " Merge its adapters first: give `model.merge_and_unload()`."
    if isinstance(value, str) and half_letter([value]) is not None:
        return f" {HALF}"
    half = half_letter(value) if isinstance(value, list | tuple) else None
    return "" if half is None else f" Number {half} is none. {HALF}"


def half_letter(values: Iterable[object]) -> int | None:
    """The place of the first text that holds half a surrogate pair; None if there is none."""
    return next((number for number, value in enumerate(values) if isinstance(value, str) and _is_half(value)), None)


def _is_half(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def shown(value: object) -> str:
    """`value` in a line, not a long one."""
    text = " ".join(repr(value).split()).encode("utf-8", "replace").decode()
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({type(value).__name__})"


def name_kind(kind: Any) -> str:
    """What people call a type that `fit` takes."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inside))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(name_kind(one) for one in inside)
    if origin in (tuple, list) and inside:
        many = f"{len(inside)} values, each " if origin is tuple and inside[-1] is not Ellipsis else "values, each "
        return f"a list of {many}{name_kind(inside[0])}"
    if origin is collections.abc.Callable:
        return "a function"
    if origin is collections.abc.Iterable:
        return f"a list (or another iterable) of values, each {name_kind(inside[0])}"
    if origin is collections.abc.Mapping:
        return "a dict"
    named = getattr(origin or kind, "__name__", str(kind))
    return KINDS.get(named, f"{'an' if named[0] in 'AEIOU' else 'a'} {named}")


@functools.cache
def _annotations(owner: Any) -> dict[str, Any]:
    kinds = typing.get_type_hints(owner)
    if isinstance(owner, type):
        return {item.name: kinds[item.name] for item in dataclasses.fields(owner)}
    return {name: kind for name, kind in kinds.items() if name != "return"}


def _as(value: Any, kind: Any) -> Any:
    """`value` as `kind`, or `_WRONG`."""
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value if any(isinstance(value, type(one)) and value == one for one in inside) else _WRONG
    if origin in (typing.Union, types.UnionType):
        return next((made for made in (_as(value, one) for one in inside) if made is not _WRONG), _WRONG)
    if origin in (tuple, list):
        return _as_list(value, origin, inside)
    if origin is dict:
        return _as_dict(value, inside) if isinstance(value, Mapping) else _WRONG
    if origin is collections.abc.Iterable:
        return value if isinstance(value, collections.abc.Iterable) and not isinstance(value, str | Mapping) else _WRONG
    plain = _PLAIN.get(kind)
    if plain is not None:
        return plain(value)
    one: Any = origin or kind
    return value if one is Any or not isinstance(one, type) or isinstance(value, one) else _WRONG


def _as_list(value: Any, origin: Any, inside: tuple[Any, ...]) -> Any:
    if not isinstance(value, list | tuple | range):
        return _WRONG
    fixed = origin is tuple and inside[-1] is not Ellipsis
    if fixed and len(value) != len(inside):
        return _WRONG
    made = [_as(item, one) for item, one in zip(value, inside if fixed else inside[:1] * len(value), strict=True)]
    return _WRONG if any(item is _WRONG for item in made) else origin(made)


def _as_dict(value: Mapping[Any, Any], inside: tuple[Any, ...]) -> Any:
    made = {_as(name, inside[0]): _as(item, inside[1]) for name, item in value.items()}
    return _WRONG if _WRONG in made or any(item is _WRONG for item in made.values()) else made


def _as_int(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return _WRONG
    number = int(value)
    return number if abs(number) <= LARGEST else _WRONG


def _as_float(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return _WRONG
    try:
        number = float(value)
    except OverflowError:
        return _WRONG
    return number if math.isfinite(number) else _WRONG


def _as_str(value: Any) -> Any:
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    return text if isinstance(text, str) and "\0" not in text and not _is_half(text) else _WRONG


_PLAIN: dict[Any, Callable[[Any], Any]] = {
    int: _as_int,
    float: _as_float,
    str: _as_str,
    bool: lambda value: value if isinstance(value, bool) else _WRONG,
}
