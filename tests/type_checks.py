"""Checks of shapes while the tests run, by beartype through jaxtyping's import hook.

Of those modules whose signatures have shapes, which no type checker sees; all other types are mypy's to check, and at
run time they cost half of what the tests took.

The hook wraps the functions within functions too, and so again whenever the outer one is called: 2 ms each, by which a
good part of the tests' time went into making checks that had been made before. What the hook hands over is a stub that
knows a signature and nothing else, so that one check serves all that are alike.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from beartype import beartype
from jaxtyping import install_import_hook

SOURCE = Path(__file__).parents[1] / "src"
_MADE: dict[Any, Callable[..., Any]] = {}


def with_shapes() -> list[str]:
    """Names of the modules of makd that say shapes."""
    files = [path for path in sorted(SOURCE.glob("makd/**/*.py")) if "from jaxtyping import" in path.read_text("utf-8")]
    return [".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in files]


def check_shapes() -> None:
    """Have those modules checked when they are imported."""
    install_import_hook(with_shapes(), "tests.type_checks.check_types")


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
