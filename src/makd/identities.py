"""What work that was stopped is of, compared where it is gone on with: one way to look, and one to tell it.

Stands below all stations. An identity is flat: names and what JSON knows.
"""

import logging
from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

VERSIONS = "versions"
"""An entry that is told of where it is another one, and refuses nothing."""
_PACKAGES = ("makd", "torch", "transformers", "accelerate")
"""On which the last digits of a student depend."""
_SHOWN = 80
"""Characters of a value in a message."""


class Difference(NamedTuple):
    """An entry that two identities do not share, shortened for a message."""

    name: str
    found: str
    wanted: str


def versions() -> dict[str, str]:
    """Of makd, and of what it computes with."""
    return {name: version(name) for name in _PACKAGES}


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], left_out: Collection[str] = ()
) -> list[Difference]:
    """All of them, but for the entries `left_out`; first those that `wanted` has."""
    unlike = (name for name in dict.fromkeys((*wanted, *found)) if found.get(name) != wanted.get(name))
    return [
        Difference(name, shorten(found.get(name)), shorten(wanted.get(name))) for name in unlike if name not in left_out
    ]


def warn_other_versions(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Warn where work was begun by other versions than those that go on: its last digits may be others.

    Args:
        found: identity of the work.
        wanted: of this run.
        what: the work, such as "the training".
    """
    before = found.get(VERSIONS)
    now = wanted.get(VERSIONS, {})
    changed = [
        f"{name} was {before.get(name)}, is {text}"
        for name, text in now.items()
        if isinstance(before, Mapping) and before.get(name) != text
    ]
    if changed:
        logger.warning(
            "%s was begun with other versions (%s): the student may differ in its last digits from one that was made "
            "without a stop", what, "; ".join(changed),
        )  # fmt: skip


def shorten(value: Any) -> str:
    """A hash as its first 12 digits, anything else as it is, up to 80 characters."""
    text = str(value)
    if len(text) == 64 and " " not in text:
        return text[:12]
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
