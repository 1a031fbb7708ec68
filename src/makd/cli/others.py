"""What the other processes of a command say: nothing, where torchrun or accelerate launch started it several times.

The first one prints tables, bars and log lines, and what is wrong with settings, which all of them meet alike.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from makd.errors import MakdError
from makd.processes.first import was_told
from makd.processes.started import name, process_count

GRACE = 15.0
"""Seconds that a process which met an error leaves the first one to tell of it. When that one ends, this one is ended
by what started both; what only this one met is told after that."""


def run_silently(command: Callable[[], int]) -> int:
    """Run a command that prints nothing; gives its exit code."""
    with _silence():
        try:
            return command()
        except Exception as error:
            failed = error
    time.sleep(GRACE)
    if not was_told(failed):
        is_known = isinstance(failed, MakdError) or is_of_lost_process(failed)
        told = str(failed) if is_known else "".join(traceback.format_exception(failed))
        print(f"makd ({name()}): {told}", file=sys.stderr)
    return 2 if isinstance(failed, MakdError) else 1


def is_of_lost_process(error: Exception) -> bool:
    """Whether `error` is what a process meets in the middle of its work when another one is gone."""
    known = ("LostProcessError", "DistBackendError", "DistNetworkError", "DistStoreError")
    return process_count() > 1 and (type(error).__name__ in known or "gloo/" in str(error))


@contextmanager
def _silence() -> Iterator[None]:
    """Whatever is written to stdout and stderr goes nowhere, by libraries that are no Python, too."""
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for place, stream in enumerate(kept, start=1):
            os.dup2(stream, place)
            os.close(stream)
        os.close(nowhere)
