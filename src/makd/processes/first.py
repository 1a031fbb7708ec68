"""What the first process of a run does for all, and what all do after it. With one process these only call."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from makd.errors import MakdError
from makd.processes import started

P = ParamSpec("P")
R = TypeVar("R")

_depth = 0
"""How many blocks this process is in that the others wait for: whatever is called there is done at once."""


def in_first(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function done by the first process alone; all get what it returns, or the error that it raises."""

    @functools.wraps(function)
    def done(*args: P.args, **kwargs: P.kwargs) -> R:
        return from_first(lambda: function(*args, **kwargs))

    return done


def from_first(make: Callable[[], R]) -> R:
    """What the first process makes, in all of them; or the error that it meets."""
    if not is_shared():
        return make()
    if started.is_first():
        return _tell(make)
    made: R = _hear()
    return made


def in_turn(make: Callable[[], R]) -> R:
    """What each process makes for itself: the first one before the others, who raise what it raises.

    So files that the making leaves on disk are there once, and what is refused is refused once.
    """
    if not is_shared():
        return make()
    if not started.is_first():
        _hear()
        return make()
    made: list[R] = []
    _tell(lambda: made.append(make()))
    return made[0]


def wait_for_everyone() -> None:
    """Wait until all processes are here: what each has written is on disk."""
    if is_shared():
        from makd.processes import messages

        messages.barrier()


def was_told(error: BaseException) -> bool:
    """Whether `error` was met by the first process, which tells of it."""
    return getattr(error, _MARK, False) is True


_MARK = "_met_by_first_process"


def is_shared() -> bool:
    """Whether several processes are at the same place of the same program."""
    return started.process_count() > 1 and _depth == 0


def _tell(make: Callable[[], R]) -> R:
    from makd.processes.messages import send

    global _depth
    started.group()
    _depth += 1
    try:
        made = make()
    except Exception as error:
        mendable = isinstance(error, MakdError)
        told = error if mendable else MakdError(f"The first process failed: {type(error).__name__}: {error}")
        send((None, told))
        raise
    finally:
        _depth -= 1
    send((made, None))
    return made


def _hear() -> Any:
    from makd.processes.messages import receive

    made, error = receive()
    if error is not None:
        setattr(error, _MARK, True)
        raise error
    return made
