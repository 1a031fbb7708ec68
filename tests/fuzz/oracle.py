"""What holds for any input: a sound result or one message, nothing else on disk, in little memory and time."""

import contextlib
import hashlib
import io
import json
import math
import resource
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

from makd.cli.main import main
from makd.errors import MakdError

SECONDS = 60
"""Of a case; none takes more than a few."""
MEMORY = 4 * 2**30
"""Bytes of address space that a case may take besides what the process has."""
USER_ERROR = 2


class Hang(BaseException):
    """A case took too long."""


def generated(examples: int) -> settings:
    """The same cases at every run, all of them, also after one that fails."""
    return settings(
        max_examples=examples, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


class Cases:
    """Counts cases, and keeps what was wrong until `settle`."""

    def __init__(self) -> None:
        self.total = 0
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.last = ""

    def command(self, what: str, words: Sequence[object], inputs: Sequence[Path], output: Path | None = None) -> None:
        """Hold `makd WORDS` to the specification; `output` is the folder of a student that it makes."""
        self.total += 1
        before, out, err = snapshot(inputs), io.StringIO(), io.StringIO()
        code: object = None
        try:
            with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([*map(str, words), "--quiet"])  # what goes on is no message
                told = sound(output) if code == 0 and output is not None else None
        except (Exception, Hang, SystemExit) as error:
            told = f"{type(error).__name__}: {str(error)[:200]} {where(error)}"
        text = err.getvalue()
        if told is None and code not in (0, USER_ERROR):
            told = f"exit code {code}"
        if told is None and code == USER_ERROR and text.count("makd: ") != 1:
            told = f"not one message: {text[-200:]}"
        if told is None and "Traceback" in text + out.getvalue():
            told = "a traceback"
        if told is None and snapshot(inputs) != before:
            told = "an input was changed"
        if told is None and code == USER_ERROR and output is not None and output.exists():
            told = "an error, and an output"
        if output is not None:
            shutil.rmtree(output, ignore_errors=True)
        self.note(what, "fine" if code == 0 else "refused", told)

    def call(self, what: str, function: Callable[[], object], judge: Callable[[object], str | None]) -> None:
        """The same for a call in Python: a `MakdError`, or a result in which `judge` finds nothing wrong."""
        self.total += 1
        outcome, told = "fine", None
        try:
            with bounded():
                told = judge(function())
        except MakdError as error:
            outcome, told = "refused", None if str(error) else "an error without a message"
        except (Exception, Hang) as error:
            told = f"{type(error).__name__}: {str(error)[:200]} {where(error)}"
        self.note(what, outcome, told)

    def note(self, what: str, outcome: str, told: str | None) -> None:
        self.last = outcome if told is None else "wrong"
        self.outcomes[self.last] += 1
        if told is not None:
            self.wrong.append(f"{what}: {told}")

    def settle(self) -> None:
        """Tell all that was wrong since the last time."""
        wrong, self.wrong = self.wrong, []
        assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(wrong)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """A limit on time and memory."""

    def stop(*_: object) -> None:
        raise Hang(f"after {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, old[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


def snapshot(places: Sequence[Path]) -> dict[str, str]:
    """Every file below `places`, by its content."""
    files = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*")))]
    return {str(path): hashlib.sha1(path.read_bytes()).hexdigest() if path.is_file() else "" for path in files}


def sound(student: Path) -> str | None:
    """What is wrong with a saved student."""
    import makd
    from makd.loading import load_model

    metrics = json.loads((student / "metrics.json").read_text(), parse_constant=lambda name: math.nan)
    if not all(map(math.isfinite, numbers_in(metrics))):
        return "metrics that are not finite"
    found = makd.fingerprint(load_model(str(student)))
    if metrics.get("fingerprint", found) != found:  # a streamed one is never whole in memory: it has none
        return "the student that is loaded is not the one that was measured"
    return None


def numbers_in(value: object) -> Iterator[float]:
    """All numbers in JSON."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(item)
    elif isinstance(value, int | float):
        yield value


def where(error: BaseException) -> str:
    """Where an error was raised, of this project's lines."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/makd/" in frame.filename]
    return f"({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
