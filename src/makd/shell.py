"""Lines of a shell that call makd, for whoever is told what to try next: on the terminal, and in a report."""

import shlex

PLACES = frozenset({"texts.txt", "TEACHER", "ANOTHER"})
"""What a person is to put something else for."""


def command(*words: object, **flags: object) -> str:
    """A line that calls makd; what is None is left out, and an empty text stands for a bare flag."""
    parts = ["makd", *map(str, words)]
    for name, value in flags.items():
        if value is not None:
            parts += [f"--{name.replace('__', '.')}", *([str(value)] if value != "" else [])]
    return " ".join(part if part in PLACES else shlex.quote(part) for part in parts)


def command_on_pair(
    name: str, student: object, teacher: str, tokenizer: str | None, head: str | None, **flags: object
) -> str:
    """A line about a saved student and its teacher, which are read as they were when the student was made.

    Args:
        name: `distill`, `evaluate` or `bench`.
        student: its folder.
        teacher: as that run named it.
        tokenizer: that the run was given; None if it came with the teacher.
        head: that the run was given; None or `auto` if it is the checkpoint's own.
        flags: more of them.
    """
    known = None if head == "auto" else head
    own = {"head": known} if name == "bench" else {"recipe__head": known}
    if name == "bench" and "formats" not in flags:
        tokenizer = None  # text is read for formats alone
    return command(name, student, teacher=teacher, tokenizer=tokenizer, **own, **flags)
