"""Where memory ran out in the middle of a command: what is said then, in the place of a traceback."""

import re

_OF_A_CPU = "can't allocate memory"
"""What torch says of a machine's memory, in a RuntimeError like any other."""
_ASKED = re.compile(r"tried to allocate ([\d.]+ ?\w+)", re.IGNORECASE)


def ran_out(error: BaseException) -> bool:
    """Whether `error` is what a process meets that gets no more memory, of the machine's or of an accelerator's."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _OF_A_CPU in str(error)


def describe_shortage(error: BaseException) -> str:
    """The message, with what was asked for last."""
    found = _ASKED.search(str(error))
    asked = "" if found is None else f" ({found[1]} more were asked for)"
    return (
        f"Memory ran out{asked}. Smaller batches take less (recipe.training.batch_size, with accumulate; "
        "recipe.calibration.batch_size), so do shorter texts, and --stream where it is allowed; --dry_run says what a "
        "run takes, and in which phase."
    )
