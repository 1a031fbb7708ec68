"""Station 9: which files of a folder makd wrote. Nothing else is ever removed.

Every output folder has a list of its files, `makd.json`. Folders of older versions have none: they are known by what
every run leaves, and hold no file that makd never writes.
"""

import json
import logging
import os
import re
from importlib.metadata import version
from pathlib import Path

from makd.run_files import ABOUT, FOLDER, PAGE
from makd.weights.shards import weight_files
from makd.whole_files import file_digest

logger = logging.getLogger(__name__)

MANIFEST = "makd.json"
_LATER = ("README.md", "bench.json", PAGE)
"""What `makd bench` and `makd report` add to a student's folder."""
_RUN = {"recipe.yaml", "metrics.json", "environment.json"}
"""What every run leaves, but that of a cache."""
_OF_A_RUN = re.compile(
    r"(model|pytorch_model)[-.\w]*\.(safetensors|json)|(generation_)?config\.json|tokenizer[\w.]*|[\w.]*vocab[\w.]*"
    r"|merges\.txt|(special_tokens_map|added_tokens)\.json|[\w.]+\.model|chat_template\.\w+"
    r"|recipe\.yaml|(metrics|environment|bench)\.json|README\.md"
    rf"|{re.escape(PAGE)}|{FOLDER}/({'|'.join(map(re.escape, ABOUT))})"
    r"|modules\.json|config_sentence_transformers\.json|sentence_bert_config\.json|\d_\w+/(config\.json|[\w.]+\.(safetensors|bin))"
)
_OF_A_CACHE = re.compile(r"cache\.json|\d{8}-\d{8}\.safetensors")


def write_manifest(folder: Path) -> None:
    """Note that all files of `folder` are makd's, and what a model's weights are (SHA-256 of each file)."""
    files = [name for name in list_files(folder) if name != MANIFEST]
    weights = {path.name: file_digest(path) for path in weight_files(folder)}
    content = {"makd": version("makd"), "files": files, **({"weights": weights} if weights else {})}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def warn_changed_weights(folder: Path) -> None:
    """Warn if the weights in `folder` are not those that makd saved there: of sound numbers nothing else would tell.

    They may have been trained further; but then the folder's metrics are of others.
    """
    try:
        known = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["weights"]
        changed = [path.name for path in weight_files(folder) if known.get(path.name) != file_digest(path)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # of an older makd, or of somebody else's making
    if changed:
        logger.warning(
            "The weights in %s are not those that makd saved there (%s differs): trained further, or damaged. "
            "metrics.json and README.md there tell of the others.",
            folder,
            ", ".join(changed),
        )


def foreign_files(folder: Path) -> list[str]:
    """The files of `folder` that makd did not write, as paths in it."""
    names = list_files(folder)
    own = _own_files(folder)
    if own is not None:
        return [name for name in names if name not in own and name not in (MANIFEST, *_LATER)]
    if names and set(names) >= _RUN:
        return [name for name in names if not _OF_A_RUN.fullmatch(name)]
    if "cache.json" in names:
        return [name for name in names if not _OF_A_CACHE.fullmatch(name)]
    return names


def list_files(folder: Path) -> list[str]:
    """All files of `folder` and below, sorted, with `/`; a link to a folder is a file here."""
    found = []
    for above, folders, files in os.walk(folder):
        links = [name for name in folders if (Path(above) / name).is_symlink()]
        found += [(Path(above) / name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def _own_files(folder: Path) -> set[str] | None:
    """What the folder's list says; None if there is none that can be read."""
    try:
        return set(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
