"""The clocks of a command's stages: from what is told of the work to what a person reads. Bars and lines share it."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from makd.progress import Progress, peak_bytes


@dataclass
class Stage:
    """A stage that has begun."""

    last: Progress
    first: int
    """What was done when it was first heard of: of a run that goes on, not 0."""
    started: float
    heard: float
    is_told: bool = False
    """Whether a line has said that it is over."""
    number: int = 0
    """Which one it was, counted from 0: a bar of its own."""

    @property
    def is_over(self) -> bool:
        """Whether all is done."""
        return self.last.done >= self.last.of

    @property
    def seconds(self) -> float:
        """From its beginning to what was heard last."""
        return self.heard - self.started

    @property
    def seconds_left(self) -> float | None:
        """At the pace that it has had; None while nobody can tell."""
        done, ahead = self.last.done - self.first, self.last.of - self.last.done
        return self.seconds / done * ahead if done > 0 and self.last.unit else None

    @property
    def pace(self) -> float | None:
        """Tokens a second; None where nobody counts them."""
        return self.last.tokens / self.seconds if self.last.tokens and self.seconds > 0 and self.first == 0 else None

    @property
    def counted(self) -> str:
        """How much is done, in words."""
        return f"{self.last.done:,}/{self.last.of:,} {self.last.unit}" if self.last.unit else ""

    @property
    def figures(self) -> list[str]:
        """Pace and losses, in words."""
        pace = [] if self.pace is None else [f"{self.pace:,.0f} tokens/s"]
        return pace + [f"{name} {value:.4g}" for name, value in self.last.losses.items()]


@dataclass
class Stages:
    """All stages of a command."""

    clock: Callable[[], float] = time.monotonic
    running: dict[str, Stage] = field(default_factory=dict)
    begun: int = 0

    def hear(self, told: Progress) -> tuple[Stage, bool]:
        """The stage that something was told of, and whether it begins with that."""
        now, stage = self.clock(), self.running.get(told.what)
        if stage is not None and told.done >= stage.last.done and not (stage.is_over and told.done == 0):
            stage.last, stage.heard = told, now
            return stage, False
        first = told.done if told.done < told.of else 0
        stage = self.running[told.what] = Stage(told, first, now, now, number=self.begun)
        self.begun += 1
        return stage, True


def in_words(seconds: float) -> str:
    """A time as people say it: 5 s, 1 min 5 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def peak_memory() -> list[str]:
    """The most memory that the process has had, in words; on a GPU, what its tensors took, for which nobody waits."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return [f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB at its peak, on the GPU"]
    peak = peak_bytes()
    return [] if peak is None else [f"{peak / 1e9:.1f} GB at its peak"]
