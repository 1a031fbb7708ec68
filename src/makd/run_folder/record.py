"""Station 9: what every run leaves beside its student, so that another person can repeat it and trust the numbers."""

import dataclasses
import json
import math
import platform
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from makd.data.settings import BUILT_IN
from makd.errors import NumericsError
from makd.extensions import loaded
from makd.plain_yaml import dump_yaml

RECORDED_PACKAGES = (
    "makd",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
)

NAMES_OF_FILES = (
    ("teacher",),
    ("student",),
    ("model",),
    ("tokenizer",),
    ("data", "path"),
    ("task", "path"),
    ("task", "extra_text"),
    ("recipe", "cache"),
)
"""Settings of a run that may name a file or folder; or else a hub id, or something inside a package."""
NO_FILES = (BUILT_IN,)
"""Names that mean something of makd's own, also where a file is called so."""


def plain(value: Any) -> Any:
    """Dataclasses, enums, tuples and paths as what YAML and JSON know."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def write_recipe(folder: Path, settings: Mapping[str, Any]) -> None:
    """`recipe.yaml`: every setting of the run, defaults too. The command that wrote it repeats it with `--config`.

    Names of files and folders that are there are written whole (`NAMES_OF_FILES`), so that it does so from anywhere.
    """
    known = plain(settings)
    for inside, last in _named_files(known):
        name = inside.get(last)
        if isinstance(name, str) and name not in NO_FILES and is_on_disk(name):
            inside[last] = str(Path(name).expanduser().absolute())
    (folder / "recipe.yaml").write_text(dump_yaml(known), encoding="utf-8")


def _named_files(known: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where in a run's settings names of files may stand."""
    for *above, last in NAMES_OF_FILES:
        inside = known
        for key in above:
            inside = inside.get(key) or {}
        yield inside, last
    for source in (known.get("data") or {}).get("mixture") or ():
        yield source, "path"


def is_on_disk(name: str) -> bool:
    """Whether `name` is that of a file or folder on this machine; `~` is one's own folder."""
    try:
        return bool(name) and Path(name).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a name of a file; of a user that is not
        return False


def write_json(path: Path, content: Any) -> None:
    """`content` as indented JSON.

    Raises:
        NumericsError: a number in it is NaN or infinite, which JSON does not know; the text names it.
    """
    path.write_text(to_json(content, indent=2) + "\n", encoding="utf-8")


def to_json(content: Any, indent: int | None = None) -> str:
    """`content` as JSON, on one line without `indent`.

    Raises:
        NumericsError: a number in it is NaN or infinite, which JSON does not know; the text names it.
    """
    known = plain(content)
    try:
        return json.dumps(known, indent=indent, allow_nan=False)
    except ValueError as error:
        place, value = next(_not_finite(known))
        raise NumericsError(
            f"{place} is {value}: not a number that can be written down or relied on. A model's weights or outputs are "
            "broken, or it was measured on too little."
        ) from error


def _not_finite(content: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Where NaN or infinity stands in what JSON knows, as keys joined by dots, and which of them."""
    if isinstance(content, float) and not math.isfinite(content):
        yield place, content
    elif isinstance(content, dict | list):
        for key, item in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _not_finite(item, f"{place}.{key}" if place else str(key))


def describe_environment(device: torch.device, seed: int) -> dict[str, Any]:
    """Versions, machine, device and seed of a run: what `environment.json` holds."""
    versions: dict[str, str | None] = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "versions": versions,
        **({"extensions": loaded()} if loaded() else {}),
        "platform": platform.platform(),
        "processor": _processor(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def _processor() -> str:
    """The processor's name; Linux keeps it in /proc, elsewhere `platform` knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
