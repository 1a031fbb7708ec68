"""The command line's part about `--effort`: its settings stand in for defaults, so that whatever is given wins."""

import logging
from collections.abc import Sequence
from typing import Any

from makd.efforts import INSTEAD, settings_of

logger = logging.getLogger(__name__)


def parse_with_effort(parser: Any, words: Sequence[str]) -> Any:
    """The settings in `words` and files, with those of the effort that they name, if any, in the place of defaults.

    Raises:
        UnknownNameError: there is no such effort.
    """
    settings = parser.parse_args(words)
    if settings.get("effort") is None:
        return settings
    defaults, wanted = parser.get_defaults(), settings_of(settings.effort)
    for one, other in INSTEAD.items():
        if settings[f"recipe.{other}"] != defaults[f"recipe.{other}"]:
            del wanted[one]
    parser.set_defaults({f"recipe.{name}": value for name, value in wanted.items()})
    return parser.parse_args(words)
