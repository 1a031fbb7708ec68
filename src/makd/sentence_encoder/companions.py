"""The files that make a student a sentence-transformers folder: those of its teacher's, copied.

Files are copied as they are; none is opened but `modules.json`. A pickle is not run.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from makd.sentence_encoder.layout import (
    CLASSIFIER,
    MODULES,
    SETTINGS,
    TRANSFORMER_SETTINGS,
    Origin,
    find_folder,
    read_described,
    read_modules,
    transformer_path,
)

logger = logging.getLogger(__name__)


def copy_companions(origin: Origin, result: Path) -> None:
    """Copy what the sentence-transformers folder of a teacher has besides the transformer into its student's.

    The student's transformer lies in `result` itself, also where the teacher's lies in a subfolder; `modules.json` says
    so.

    Args:
        origin: of the teacher; nothing is done for one without such a folder.
        result: holds the student's model and tokenizer.

    Raises:
        ModelLoadError: `modules.json` is damaged.
    """
    folder = find_folder(origin.name)
    if folder is None:
        return
    _copy_files([folder / MODULES], result)
    _copy_modules(folder, result)
    inner = transformer_path(folder)
    if inner:
        lines = [
            line | {"path": ""} if _is_transformer(line) else line for line in read_described(folder / MODULES, list)
        ]
        (result / MODULES).write_text(json.dumps(lines, indent=2), encoding="utf-8")
    _copy_files([folder / SETTINGS, *(folder / inner / name for name in TRANSFORMER_SETTINGS)], result)
    if _copy_files([folder / name for name in CLASSIFIER], result):
        logger.warning(
            "%s has a SetFit classifier, which was copied as it is: it is a pickle, and not opened. It was fitted on "
            "the teacher's embeddings; measure it on the student's, or fit it anew.",
            folder,
        )


def _is_transformer(line: Mapping[str, Any]) -> bool:
    return str(line["type"]).endswith(".Transformer")


def _copy_modules(folder: Path, result: Path) -> None:
    for module in read_modules(folder):
        if module.kind == "Transformer" or not module.path:
            continue
        if (folder / module.path).is_dir():  # Normalize has no files, and packages keep no empty folders
            shutil.copytree(folder / module.path, result / module.path, dirs_exist_ok=True)
        if not module.is_known:
            logger.warning(
                "%s names the module %s. Its files were copied as they are; whether it fits the student was not "
                "measured: measure it by sentence-transformers before it is served.",
                folder / MODULES,
                module.type,
            )


def _copy_files(paths: Iterable[Path], result: Path) -> bool:
    """Copy those that are there; whether any is."""
    there = [path for path in paths if path.is_file()]
    for path in there:
        shutil.copy(path, result / path.name)
    return bool(there)
