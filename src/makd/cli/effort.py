"""The command line's part about `--effort`: its settings stand in for defaults, so that whatever is given wins."""

from collections.abc import Sequence
from typing import Any

from makd import pipeline
from makd.efforts import INSTEAD, settings_of
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
    defaults = parser.get_defaults()
    wanted = settings_of(settings.effort, _data_of(settings, defaults))
    for one, other in INSTEAD.items():
        if settings[f"recipe.{other}"] != defaults[f"recipe.{other}"]:
            wanted.pop(one, None)
    parser.set_defaults({f"recipe.{name}": value for name, value in wanted.items()})
    return parser.parse_args(words)


def _data_of(settings: Any, defaults: Any) -> object:
    """What the run will be on, as far as an effort asks: a task, or not."""
    if settings.get("task") is not None:
        return TaskConfig(name=settings["task.name"])
    if settings.get("data") != defaults.get("data"):
        return None
    try:
        return pipeline.data_of(settings.teacher)
    except MakdError:  # the command itself will say so
        return None
