"""What a person reads of the work while it goes on: clocks of stages, and lines in a pipe."""

import io
import sys

import pytest
from rich.console import Console

from makd.cli.progress import EVERY, SILENCE, Lines, showing
from makd.cli.stages import Stages, in_words
from makd.progress import Progress, nobody, track


class Clock:
    """A clock that goes when it is told to."""

    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def lines(clock):
    return Lines(io.StringIO(), Stages(clock))


def written(lines):
    """What was written, without the memory that this process has."""
    return [line.rpartition(", ")[0] if "peak" in line else line for line in lines.stream.getvalue().splitlines()]


def test_time_left_is_told_at_the_pace_that_a_stage_has_had(clock):
    stages = Stages(clock)
    stages.hear(Progress("distil", 0, 100, "steps"))
    clock.now += 30
    stage, _ = stages.hear(Progress("distil", 25, 100, "steps"))
    assert stage.seconds_left == pytest.approx(90)


def test_a_stage_that_goes_on_in_the_middle_is_not_taken_for_a_fast_one(clock):
    stages = Stages(clock)
    stages.hear(Progress("distil", 50, 100, "steps"))
    clock.now += 10
    stage, _ = stages.hear(Progress("distil", 60, 100, "steps"))
    assert stage.seconds_left == pytest.approx(40)


def test_tokens_a_second_are_those_since_the_stage_began(clock):
    stages = Stages(clock)
    stages.hear(Progress("distil", 0, 10, "steps"))
    clock.now += 2
    stage, _ = stages.hear(Progress("distil", 1, 10, "steps", tokens=3000, losses={"loss": 0.25, "hidden": 0.125}))
    assert stage.figures == ["1,500 tokens/s", "loss 0.25", "hidden 0.125"]


def test_a_stage_that_begins_again_has_a_clock_of_its_own(clock):
    stages = Stages(clock)
    first, _ = stages.hear(Progress("evaluate", 1, 1))
    clock.now += 50
    second, begins = stages.hear(Progress("evaluate", 0, 4))
    assert begins
    assert second.number == first.number + 1
    assert second.started == 150.0


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (65.0, "1 min 5 s"), (7800.0, "2 h 10 min")]
)
def test_times_are_told_as_people_say_them(seconds, words):
    assert in_words(seconds) == words


class TestLinesInAPipe:
    def test_come_when_a_stage_begins_every_so_often_and_when_it_is_over(self, lines, clock):
        for step in range(61):
            lines.hear(Progress("distil", step, 60, "steps"))
            clock.now += 1
        assert written(lines) == [
            "makd: distil: 0/60 steps, begins",
            f"makd: distil: 15/60 steps, {EVERY:.0f} s, 45 s left",
            "makd: distil: 30/60 steps, 30 s, 30 s left",
            "makd: distil: 45/60 steps, 45 s, 15 s left",
            "makd: distil: 60/60 steps, done in 1 min 0 s",
        ]

    def test_say_once_that_a_stage_is_over(self, lines):
        for done in (0, 1, 1, 1):
            lines.hear(Progress("load", done, 1))
        assert written(lines) == ["makd: load: begins", "makd: load: done in 0 s"]

    def test_show_losses_with_every_aspect(self, lines):
        lines.hear(Progress("distil", 2, 2, "steps", tokens=8, losses={"loss": 0.5, "matrix": 0.25}))
        assert written(lines) == ["makd: distil: 2/2 steps, done in 0 s, loss 0.5, matrix 0.25"]

    def test_are_never_missing_for_long(self, lines, clock):
        lines.hear(Progress("calibrate", 0, 3, "batches"))
        clock.now += SILENCE - 1
        lines.remind()
        assert len(written(lines)) == 1
        clock.now += 1
        lines.remind()
        lines.remind()
        assert written(lines)[1:] == ["makd: calibrate: 0/3 batches, still at work on it"]

    def test_are_not_missing_before_anything_is_told(self, lines, clock):
        clock.now += SILENCE
        lines.remind()
        assert written(lines) == ["makd: still at work"]


def test_bars_on_a_terminal_show_what_is_done_and_the_losses(monkeypatch):
    screen = io.StringIO()
    shown = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr("makd.cli.progress.terminal", lambda: shown)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with showing() as hear:
        hear(Progress("distil", 0, 2, "steps"))
        hear(Progress("distil", 1, 2, "steps", tokens=10, losses={"loss": 0.5, "hidden": 0.25}))
    for words in ("distil", "1/2 steps", "left", "tokens/s", "loss 0.5  hidden 0.25", "GB at its peak"):
        assert words in screen.getvalue()


def test_nobody_is_told_when_it_is_to_be_quiet(capsys):
    with showing(quiet=True) as hear:
        hear(Progress("load", 0, 1))
    assert hear is nobody
    assert capsys.readouterr().err == ""


def test_what_is_worked_through_is_told_one_by_one():
    heard = []
    assert list(track("abc", "read", heard.append, "letters")) == ["a", "b", "c"]
    assert heard == [Progress("read", done, 3, "letters") for done in range(4)]
