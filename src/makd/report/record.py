"""What a run left in its folder, read for its report. Nothing is computed, and no torch is imported."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from makd.errors import OutputError
from makd.measures import compares_pair
from makd.plain_json import read_json
from makd.plain_yaml import read_yaml
from makd.run_files import ABOUT, FOLDER, FORMAT, TRAINING

OLD = "this run was made by a makd that did not keep it"
AGAIN = "Run it again with this makd to have it."
ADVICE = "Restore it, or run the command again that made the folder."


@dataclass(frozen=True)
class Record:
    """One run."""

    folder: Path
    metrics: Mapping[str, Any]
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    found: Mapping[str, Mapping[str, Any]]
    """File of `run_files` -> its content; `missing` says why there is none, and `how` how to get it, if anyhow."""
    prefix: str = ""
    """Of the ids of its sections, where a page has several runs."""

    def key(self, name: str) -> str:
        """Id of a section."""
        return f"{self.prefix}{name}"

    @property
    def name(self) -> str:
        """What a person calls the run."""
        return self.folder.resolve().name

    @property
    def teacher(self) -> str:
        """As the recipe names it."""
        return str(self.recipe.get("teacher", "its teacher"))

    @property
    def is_trained(self) -> bool:
        """Whether this run taught a student that was there before: as a whole, or layer by layer."""
        as_a_whole = self.of(TRAINING).get("trainings") or self.metrics["tokens"]["training"]
        return bool(as_a_whole or ("student" in self.recipe and self.metrics.get("layerwise")))

    def of(self, file: str) -> Mapping[str, Any]:
        """The content of one of the run's files for its report."""
        return self.found[file]


def read_run(folder: str | Path, prefix: str = "") -> Record:
    """Read what a run left; its sections' ids begin with `prefix`.

    Raises:
        OutputError: the folder is no student that makd made, or a file in it is damaged.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise OutputError(f"{folder} is no folder. Give the output of `makd compress`, `factorize` or `distill`.")
    if not (path / "metrics.json").is_file():
        raise OutputError(
            f"{folder} has no metrics.json, so it is no student that makd made and measured. Give the output of "
            "`makd compress`, `factorize` or `distill`."
        )
    metrics = read_json(path / "metrics.json", dict, OutputError, ADVICE)
    if not compares_pair(metrics):
        raise OutputError(
            f"{path / 'metrics.json'} compares no student with a teacher: it is that of a model `makd finetune` made, "
            "or of something else. Give the output of `makd compress`, `factorize` or `distill`."
        )
    recipe = read_yaml(path / "recipe.yaml") if (path / "recipe.yaml").is_file() else {}
    environment = path / "environment.json"
    return Record(
        path,
        metrics,
        recipe if isinstance(recipe, dict) else {},
        read_json(environment, dict, OutputError, ADVICE) if environment.is_file() else {},
        {name: _read(path / FOLDER / name, metrics.get("folded", ())) for name in ABOUT},
        prefix,
    )


def _read(path: Path, folded: Sequence[str]) -> Mapping[str, Any]:
    """A file of a run for its report; a student with linears `folded` has none, for another's say what is no more."""
    if not path.is_file():
        why = f"`makd bench --fold` made {len(folded)} linears dense again: the student that it was made of has this"
        return {"missing": why, "how": None} if folded else {"missing": OLD, "how": AGAIN}
    found: dict[str, Any] = read_json(path, dict, OutputError, ADVICE)
    if found.get("format") != FORMAT:
        why = f"its {path.name} has format {found.get('format')!r}, and this makd reads {FORMAT}"
        return {"missing": why, "how": AGAIN}
    return found
