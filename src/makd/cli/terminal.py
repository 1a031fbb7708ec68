"""What the commands share: tables on stdout, log lines on stderr, and how SIGTERM ends them.

Imports rich only when something is shown.
"""

import copy
import functools
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TERMINATED = 143
"""Exit code after SIGTERM, as shells have it."""

_WIDEST = 500
"""Columns that a table may take where there is no terminal."""


def print_table(renderable: Any) -> None:
    """Print a table of rich's: as wide as the terminal, or, into a file or pipe, wide enough for every number.

    Its title is a line of its own: rich would break it, inside words too, where the table is narrower.
    """
    from rich.console import Console, Group
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        needed = Measurement.get(console, console.options.update(width=_WIDEST), renderable).maximum
        console.width = max(console.width, needed)
    for part in renderable.renderables if isinstance(renderable, Group) else [renderable]:
        if isinstance(part, Table) and part.title is not None:
            title = part.title if isinstance(part.title, Text) else Text(str(part.title), style="bold")
            console.print(title, soft_wrap=True)
            part = copy.copy(part)
            part.title = None
        console.print(part)


def seconds_line(metrics: dict[str, Any]) -> str:
    """What the stages took, as one line."""
    return "seconds: " + "  ".join(f"{stage} {value:.0f}" for stage, value in metrics["seconds"].items())


class Terminated(SystemExit):
    """SIGTERM came."""


_AGAIN = 1.0
"""Seconds until a SIGTERM that nothing came of is given again."""


@contextmanager
def unwinding_at_sigterm() -> Iterator[None]:
    """A scheduler's SIGTERM ends the block as an error does: what is temporary is removed, gigabytes of caches say.

    It is an exception, raised wherever the main thread is just then. In a destructor Python ignores exceptions, and a
    library may catch all of them, so it comes again every second until the block is being left. After the block SIGTERM
    does what it did before: whoever calls a command from Python has a handler of their own.
    """
    if threading.current_thread() is not threading.main_thread():  # no other may
        yield
        return
    left, hook = threading.Event(), sys.unraisablehook

    def end(*_: object) -> None:
        if left.is_set() or _is_unwinding():
            return
        if not again.is_alive():
            again.start()
        raise Terminated(TERMINATED)

    def insist() -> None:
        while not left.wait(_AGAIN):
            signal.raise_signal(signal.SIGTERM)

    def ignored(what: Any) -> None:
        if not issubclass(what.exc_type, Terminated):
            hook(what)

    again = threading.Thread(target=insist, daemon=True)
    before = signal.signal(signal.SIGTERM, end)
    sys.unraisablehook = ignored
    try:
        yield
    finally:
        left.set()
        if again.is_alive():
            again.join()  # or it would give one more to whoever is told next
        sys.unraisablehook = hook
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _is_unwinding() -> bool:
    """Whether what runs now was called while `Terminated` is on its way out, by a `finally` say."""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, Terminated):
        error = error.__context__
    return error is not None


NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes", "kernels", "torch.utils.flop_counter")
"""Loggers that warn of what is no concern of a user's while transformers is imported: parts of theirs for machines that
this one is not."""


@functools.cache
def terminal() -> Any:
    """Rich's console on stderr: the one of bars and log lines, so that lines stand above the bars."""
    from rich.console import Console

    return Console(stderr=True)


class _Lines(logging.Formatter):
    """A line as errors and progress have it: what it is stands before what is no ordinary word."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        return f"makd: {level}{super().format(record)}"


def hush_imports() -> None:
    """Before anything heavy is imported: libraries do not tell which of their own parts this machine is not for."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, beside ours
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def set_up_logging(quiet: bool = False) -> None:
    """Makd's own lines and the libraries' warnings go to stderr; the libraries' progress bars are silent.

    On a terminal lines are wrapped and coloured; in a pipe or a file each is one line. With `quiet`, errors alone are
    shown; a run notes its warnings for its report all the same. Libraries that the command has not imported are not.
    """
    handler: logging.Handler = logging.StreamHandler()
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(console=terminal(), show_path=False, show_time=False, markup=False)
    else:
        handler.setFormatter(_Lines())
    logger = logging.getLogger("makd")
    logger.handlers = [handler]
    handler.setLevel(logging.ERROR if quiet else logging.INFO)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        if quiet:
            transformers_logging.set_verbosity_error()
    if quiet:
        warnings.simplefilter("ignore")
