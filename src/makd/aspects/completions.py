"""Station 5: whose completions are learned from, as a plan says it. The data's own, the teacher's, or the student's.

A student that only reads what others wrote never sees its own mistakes; what it writes itself costs a generation.
`makd.distill.rollouts` does what is said here.
"""

from dataclasses import dataclass

from makd.errors import SettingError
from makd.kinds import checked


@dataclass(frozen=True, kw_only=True)
@checked("plan.completions")
class Completions:
    """Who writes the completions of a training batch; its prompts are the data's. By default they are, too."""

    student_share: float = 0.0
    """Share of the batches whose completions the student writes, as it is at that step, in [0, 1]: GKD's lambda
    (arXiv 2306.13649). With `adaptive`, where it begins."""
    teacher_share: float = 0.0
    """Share of the batches whose completions the teacher writes, in [0, 1]; 1 is sequence-level distillation (arXiv
    1606.07947). A prompt's is written once and kept."""
    adaptive: bool = False
    """Whether `student_share` rises by 0.1 whenever the loss on held-out rows does not fall from one evaluation to the
    next: DistiLLM's schedule (arXiv 2402.03898, section 3.2), which starts at 0. Each is compared with the one right
    before, the first with the loss before training; DistiLLM's code compares with the last that raised the share.
    Without `training.evaluate_every` it is evaluated after each tenth of the steps."""
    replay: int = 0
    """So many of the student's completions are kept, the newest, and drawn again: a batch of the student's is then
    written anew with a probability that falls to 0 at the end of the training, and drawn otherwise (DistiLLM, whose
    code draws none before all of these are there; here a batch of them is enough). At least as many as a batch has
    rows; 0 keeps none: each is learned from once, by the student that wrote it."""
    max_new_tokens: int = 128
    """Tokens of a completion that is written, at most."""
    temperature: float = 1.0
    """Of the sampling, above 0."""
    top_p: float = 1.0
    """Of the sampling: the likeliest tokens that have this probability together, in (0, 1]."""

    def __post_init__(self) -> None:
        checks = {
            "student_share": (0 <= self.student_share <= 1, "a share of the batches, in [0, 1]"),
            "teacher_share": (0 <= self.teacher_share <= 1, "a share of the batches, in [0, 1]"),
            "replay": (self.replay >= 0, "a number of completions, or 0 to keep none"),
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1 token"),
            "temperature": (self.temperature > 0, "above 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
        }
        for name, (fine, allowed) in checks.items():
            if not fine:
                raise SettingError(f"plan.completions.{name} is {allowed}; got {getattr(self, name)}.")
        if self.student_share + self.teacher_share > 1:
            raise SettingError(
                f"plan.completions: student_share {self.student_share} and teacher_share {self.teacher_share} are more "
                "than all batches together. Their sum is at most 1; the data's own completions are the rest."
            )
        idle = [name for name in _OF_WRITING if getattr(self, name) != getattr(Completions, name)]
        if idle and not self.written:
            raise SettingError(
                f"plan.completions.{idle[0]} is {getattr(self, idle[0])}, and nothing is written: student_share and "
                "teacher_share are 0, and completions of one's own stand in the place of a preset's. Give its share "
                "besides."
            )
        if self.replay and not self.by_student:
            raise SettingError(
                f"plan.completions.replay keeps {self.replay} of the student's completions, and it writes none "
                "(student_share 0, adaptive false); the teacher's are kept in any case. Take replay 0, or give the "
                "student its share."
            )
        if self.adaptive and self.teacher_share > 0:
            raise SettingError(
                f"plan.completions.adaptive raises the student's share to 1, which leaves none for the teacher's "
                f"({self.teacher_share}). Take teacher_share 0, or adaptive false."
            )

    @property
    def by_student(self) -> bool:
        """Whether the student ever writes."""
        return self.student_share > 0 or self.adaptive

    @property
    def written(self) -> bool:
        """Whether any completion is written during the training."""
        return self.by_student or self.teacher_share > 0


_OF_WRITING = ("replay", "max_new_tokens", "temperature", "top_p")
"""Settings of what is written."""
