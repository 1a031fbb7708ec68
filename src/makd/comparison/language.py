"""Station 10: what decoders are compared on: text to learn from, kinds of text and instructions to be measured on.

The teacher is the experiment's as it is: nothing is fine-tuned. There are no labels either, and no official score: see
`makd.comparison.language_rows`.
"""

from dataclasses import dataclass
from pathlib import Path

from makd.data import DataConfig
from makd.errors import SettingError
from makd.evaluation import InstructionsConfig
from makd.kinds import checked
from makd.loading import check_dtype


@dataclass(frozen=True, kw_only=True)
@checked("language[]")
class LanguageConfig:
    """Where the students of a causal language model meet."""

    name: str
    """What cells call it."""
    text: DataConfig
    """Its training rows are what all students learn from; its held-out rows are one kind of text that they are measured
    on."""
    other: DataConfig | None = None
    """Another kind of text that they are measured on, on its held-out rows, and not taught."""
    instructions: tuple[InstructionsConfig, ...] = ()
    """What teacher and students answer, for ROUGE-L."""
    rows: int = 200
    """Held-out blocks of each kind of text, at most."""
    batch_size: int = 16
    """Blocks of a forward, when it is measured."""
    dtype: str = "float32"
    """dtype that the teacher runs in, and a student where it is measured."""
    held_out: float | None = None
    """Share of the training rows that is taken from them and is the only text to be measured on, as a search does; None
    takes the held-out rows."""

    def __post_init__(self) -> None:
        if not self.name or set(self.name) & set(",="):
            raise SettingError(f"language[].name is a word without , and =; got {self.name!r}.")
        for name in ("rows", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingError(f"language[].{name} is at least 1; got {getattr(self, name)}.")
        if self.held_out is not None and not 0 < self.held_out < 1:
            raise SettingError(f"language[].held_out is a share of the training rows, in (0, 1); got {self.held_out}.")
        check_dtype(self.dtype)
        names = [instructions_name(one) for one in self.instructions]
        if len(set(names)) < len(names):
            raise SettingError(
                f"language[].instructions differ in the last part of their paths, which scores are called by; got "
                f"{', '.join(names)}."
            )


def instructions_name(config: InstructionsConfig) -> str:
    """What a score calls a set of instructions."""
    return Path(config.path).stem
