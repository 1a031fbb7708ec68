"""What a sentence-transformers folder consists of: `modules.json`, and where it lies, on this disk or on the hub.

Only JSON is read, and only inside the folder.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from makd.errors import ModelLoadError
from makd.plain_json import read_json

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER_SETTINGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
"""Names that the settings beside the transformer have had; sentence-transformers takes the first that is there."""
CLASSIFIER = ("config_setfit.json", "model_head.pkl")
"""SetFit's classifier on top of the embeddings."""
KNOWN = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize", "Dropout")
"""Modules that makd can carry out."""
_PACKAGE = "sentence_transformers."


@dataclass(frozen=True)
class Module:
    """One line of `modules.json`."""

    type: str
    """Class, with the Python module that it is in."""
    path: str
    """Subfolder with its files; "" is the folder itself."""

    @property
    def kind(self) -> str:
        """The class's own name."""
        return self.type.rpartition(".")[2]

    @property
    def is_known(self) -> bool:
        """Whether it is one of `KNOWN`, and not one of somebody else's with the same name."""
        return self.type.startswith(_PACKAGE) and self.kind in KNOWN


@dataclass(frozen=True)
class Origin:
    """Where a model came from: what is needed to find its sentence-transformers folder."""

    name: str = ""
    """Folder or hub id; "" for a model made in hand."""
    width: int | None = None
    """Channels of its hidden states."""
    is_encoder_decoder: bool = False


def origin_of(model: PreTrainedModel) -> Origin:
    """Where `model`, or the teacher that it was made of, was loaded from."""
    width = getattr(model.config, "hidden_size", None)
    return Origin(
        str(getattr(model, "name_or_path", "") or ""),
        width if isinstance(width, int) else None,
        bool(getattr(model.config, "is_encoder_decoder", False)),
    )


def find_folder(name: str) -> Path | None:
    """The sentence-transformers folder that the model `name` belongs to; None for any other model.

    Args:
        name: folder (of the model, which may be a subfolder), or hub id of a model that was loaded before.

    Raises:
        ModelLoadError: its `modules.json` is damaged.
    """
    path = Path(name).expanduser()
    if not name or not path.is_dir():
        return _hub_folder(name)
    if (path / MODULES).is_file():
        return path
    outer = path.absolute().parent
    is_inside = (outer / MODULES).is_file() and outer / transformer_path(outer) == path.absolute()
    return outer if is_inside else None


def is_gone(name: str) -> bool:
    """Whether `name` is neither a folder nor a hub id that was loaded on this machine.

    Then nobody knows whether the model has a sentence-transformers folder.
    """
    return bool(name) and not Path(name).expanduser().is_dir() and _loaded_from_hub(name) is None


def _loaded_from_hub(name: str) -> str | None:
    """A file of the hub's that the model `name` was loaded with."""
    try:
        paths = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer_config.json")]
    except HFValidationError:
        return None
    return next((path for path in paths if isinstance(path, str)), None)


def _hub_folder(name: str) -> Path | None:
    """Where the hub's files are on this machine, of the commit that the model was loaded from."""
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        return None
    loaded = _loaded_from_hub(name)
    if loaded is None:  # never loaded from the hub: a folder that is gone
        return None
    revision = Path(loaded).parent.name
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    found = cached_file(name, MODULES, revision=revision, **quiet)
    if found is None:
        return None
    subfolders = [module.path for module in read_modules(Path(found).parent) if module.kind != "Transformer"]
    patterns = [MODULES, SETTINGS, *TRANSFORMER_SETTINGS, *CLASSIFIER, *(f"{path}/*" for path in subfolders if path)]
    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))


def read_modules(folder: Path) -> tuple[Module, ...]:
    """The modules of a sentence-transformers folder, in the order in which they follow each other.

    Raises:
        ModelLoadError: `modules.json` is not what it has to be, or names a path outside of the folder.
    """
    lines = read_described(folder / MODULES, list)
    found = []
    for line in lines:
        if not isinstance(line, dict) or not all(isinstance(line.get(key), str) for key in ("type", "path")):
            raise ModelLoadError(
                f"{folder / MODULES} is a list of modules, each with `type` and `path`; got {line!r}. Copy the file "
                "anew, or remove it for a plain transformer."
            )
        place = PurePosixPath(line["path"].replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or ":" in line["path"]:
            raise ModelLoadError(f"{folder / MODULES} names a path outside of the folder: {line['path']!r}.")
        found.append(Module(line["type"], "" if str(place) == "." else str(place)))
    return tuple(found)


def transformer_path(folder: Path) -> str:
    """Where in a sentence-transformers folder the transformer lies: "", or a subfolder such as `0_Transformer`."""
    return next((module.path for module in read_modules(folder) if module.kind == "Transformer"), "")


def is_sentence_encoder(folder: Path) -> bool:
    """Whether its modules are a transformer, a pooling and what makd knows besides, one text to one vector."""
    modules = read_modules(folder)
    kinds = [module.kind for module in modules]
    return all(module.is_known for module in modules) and kinds[:1] == ["Transformer"] and "Pooling" in kinds


def read_described(path: Path, kind: type[Any]) -> Any:
    """The content of a JSON file that holds a list or a dict.

    Raises:
        ModelLoadError: the file cannot be read, or holds something else.
    """
    return read_json(path, kind, ModelLoadError, "Copy the file anew.")
