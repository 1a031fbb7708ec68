"""The command line's part about tasks: short flags, and what a run is on. Heavy imports wait until they are needed."""

from collections.abc import Sequence
from typing import Any

from makd.errors import MakdError

SHORT = {"--task": "--task.name", "--task_data": "--task.path", "--instructions": "--instructions.path"}
"""Flags that are worth a short form -> the settings that they are."""


def expand(name: str, words: list[str], positional: Sequence[str] = ()) -> list[str]:
    """Words with short flags written out, and what stands without a flag, as `positional` names it, in front.

    `makd distill --student runs/start` is `makd distill runs/start`. A model to fine-tune may be called `--teacher`,
    which it is to become.
    """
    short = {**SHORT, "--teacher": "--model"} if name == "finetune" else SHORT
    found = []
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        following = value if equals else next(iter(words[place + 1 :]), "")
        found.append(word if following.startswith("{") else short.get(flag, flag) + equals + value)
    for parameter in positional:
        places = [place for place, word in enumerate(found) if word.partition("=")[0] == f"--{parameter}"]
        for place in places[:1]:
            _, equals, value = found[place].partition("=")
            end = place + 1 if equals else place + 2
            found = [*([value] if equals else found[place + 1 : end]), *found[:place], *found[end:]]
    return found


def task_or_data(data: Any, task: Any, source: str) -> Any:
    """What a run is on: the task if there is one, else text; of neither, what the model `source` was made with.

    Raises:
        MakdError: both are given; or neither, and nobody knows what the model was made with.
    """
    from makd.data import DataConfig
    from makd.pipeline import data_of

    if task is not None and data != DataConfig():
        raise MakdError(
            "Give a task or data, not both: a task brings its own text (task.path; more with task.extra_text)."
        )
    if task is None and data == DataConfig():
        return data_of(source)
    return data if task is None else task
