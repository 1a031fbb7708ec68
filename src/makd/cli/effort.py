"""The command line's part about `--effort`: its settings stand in for defaults, so that whatever is given wins."""

from collections.abc import Sequence
from typing import Any

from makd import pipeline
from makd.efforts import INSTEAD, OF_STAGES, settings_of
from makd.errors import MakdError
from makd.tasks import TaskConfig


def parse_with_effort(parser: Any, words: Sequence[str]) -> Any:
    """The settings in `words` and files, with those of the effort that they name, if any, in the place of defaults.

    Raises:
        UnknownNameError: there is no such effort.
    """
    settings = parser.parse_args(words)
    if settings.get("effort") is None:
        return settings
    given = parser.parse_args(words, defaults=False)  # what is given may have a default's value
    wanted = settings_of(given["effort"], _data_of(given))
    for one, other in INSTEAD.items():
        if f"recipe.{other}" in given:
            wanted.pop(one, None)
    if given.get("recipe.stages"):
        wanted = {name: value for name, value in wanted.items() if not name.startswith(OF_STAGES)}
    parser.set_defaults({f"recipe.{name}": value for name, value in wanted.items()})
    return parser.parse_args(words)


def _data_of(given: Any) -> object:
    """What the run will be on, as far as an effort asks: a task, or not."""
    if given.get("task") is not None:
        return TaskConfig(name=given["task.name"])
    if given.get("data") is not None:
        return None
    try:
        return pipeline.data_of(given["teacher"])
    except MakdError:  # the command itself will say so
        return None
