"""How a model lies on disk: where, and in which dtype. What is made of it is saved likewise, unless asked otherwise.

Stands above `loading`: a run works in its own dtype, whatever the files have.
"""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PreTrainedModel

from makd.checkpoint import stored_dtype
from makd.errors import SettingError
from makd.loading import check_dtype, locate


def find_save_dtype(asked: str, model: str | PreTrainedModel, work: torch.dtype) -> torch.dtype:
    """The dtype that what is made of `model` is saved in.

    Args:
        asked: a dtype's name; or `auto`, for that of the checkpoint, if it is no wider than `work`.
        model: the checkpoint's name; or a model in hand, whose own dtype is taken.
        work: the dtype of the run, taken also where the files do not tell (a GGUF).
    """
    if asked != "auto":
        return check_dtype(asked)
    if isinstance(model, PreTrainedModel):
        return model.dtype
    folder = stored_folder(model)
    kept = None if folder is None else stored_dtype(str(folder))
    return work if kept is None or kept.itemsize > work.itemsize else kept


def stored_folder(name: str) -> Path | None:
    """The folder on this machine with the files of the checkpoint called `name`; None for a GGUF."""
    where = locate(name)
    if where.gguf_file is not None:
        return None
    if Path(where.folder).is_dir():
        return Path(where.folder)
    try:
        return Path(snapshot_download(where.folder, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):  # not loaded yet, or the hub keeps it elsewhere
        return None


def check_save_dtype(name: str) -> None:
    """Refuse a `name` that is neither `auto` nor a dtype.

    Raises:
        SettingError: `name` is neither.
    """
    if name != "auto":
        try:
            check_dtype(name)
        except SettingError as error:
            raise SettingError(f"save_{error} It may be auto, too: the checkpoint's own.") from error
