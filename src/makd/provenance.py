"""What of users' packages a run depends on: solvers and aspects that its settings name, and its model's anatomy."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from makd.anatomy.table import ANATOMIES
from makd.aspects import ASPECTS
from makd.errors import ModelLoadError
from makd.extensions import Extensible
from makd.loading import load_config, locate
from makd.solvers import SOLVERS

TABLES: Mapping[str, Extensible[Any]] = {
    "solver": SOLVERS,
    "start": SOLVERS,  # as the methods of a comparison call theirs
    "aspect": ASPECTS,
    "model_type": ANATOMIES,
}
"""Name of a setting, or of an entry of a model's config -> the table that it is looked up in."""


def extensions_of(*settings: Any) -> dict[str, str]:
    """`solver 'name'` -> package, version and digest, of every thing that is not makd's own.

    Args:
        settings: nested, as YAML and JSON have them: of runs, or a model's config.

    Raises:
        ExtensionError: one of them cannot be loaded.
    """
    found: dict[str, str] = {}
    for name, value in _entries(settings):
        table = TABLES.get(name)
        if table is not None and isinstance(value, str) and value not in table.own and value in table:
            origin = table.origin(value)
            if origin is not None:
                found[f"{table.kind} {value!r}"] = origin
    return dict(sorted(found.items()))


def anatomy_of(model: str) -> dict[str, str]:
    """The entry of a model's config that `extensions_of` looks at, where users' packages offer anatomies.

    Nothing is read where there are none: then no anatomy can be but makd's own.

    Args:
        model: a name, as `makd.loading.load_model` takes it. What is not there is told where it is loaded.
    """
    if not set(ANATOMIES).difference(ANATOMIES.own):
        return {}
    try:
        place = locate(model)
        return {} if place.gguf_file is not None else {"model_type": _model_type(place.folder)}
    except ModelLoadError:
        return {}


@lru_cache(maxsize=16)
def _model_type(folder: str) -> str:
    """Kept: each cell of a comparison asks."""
    return str(load_config(folder).model_type)


def _entries(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _entries(value, str(key))
    elif isinstance(settings, Sequence) and not isinstance(settings, str):
        for value in settings:
            yield from _entries(value, name)
    else:
        yield name, settings
