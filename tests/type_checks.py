"""Checks of types and shapes while the tests run, by beartype through jaxtyping's import hook.

The hook wraps the functions within functions too, and so again whenever the outer one is called: 2 ms each, by which a
good part of the tests' time went into making checks that had been made before. What the hook hands over is a stub that
knows a signature and nothing else, so that one check serves all that are alike.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype

_MADE: dict[Any, Callable[..., Any]] = {}


def check_types(stub: Callable[..., Any]) -> Callable[..., Any]:
    """The stub with checks of its arguments and its result."""
    signature = (stub.__module__, stub.__qualname__, stub.__code__, tuple(stub.__annotations__.items()))
    try:
        made = _MADE.get(signature)
    except TypeError:  # an annotation that cannot be hashed
        return beartype(stub)
    if made is None:
        made = _MADE[signature] = beartype(stub)
    return made
