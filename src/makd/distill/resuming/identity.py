"""Station 7: what a training run is of, so that a run that resumes is the one that was stopped.

Whatever the student's weights depend on is compared: settings by their names, weights, rows and tokenizer by digests.
What changes no weight may differ.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.cache import hash_teacher, hash_tokenizer
from makd.distill.training import OF_NO_WEIGHT
from makd.errors import OutputError, SettingError
from makd.identities import VERSIONS, differences, versions, warn_other_versions
from makd.processes.first import from_first
from makd.processes.started import process_count
from makd.provenance import extensions_of
from makd.whole_files import write_json_whole

START = "student before training"
"""An entry that is known later than the others: the weights that training starts from."""
_NO_WEIGHT = (*OF_NO_WEIGHT, "store")
"""Settings that change no weight: of a training, and where a factorization keeps its states."""
_PER_PROCESS = "accumulate"
"""A setting that is compared times the processes: half as many with twice the forwards take the same steps."""


def identify_run(
    settings: Mapping[str, Any],
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel | None = None,
    held_out: Dataset | None = None,
) -> dict[str, Any]:
    """What a run is compared by, but for the weights that it starts from: `with_start` adds those.

    Args:
        settings: nested, as YAML has them.
        rows: what is trained on, labels too, in their order.
        tokenizer: that made the rows.
        teacher: None where there is none.
        held_out: what is evaluated on while the student learns; None where no weight depends on that.
    """
    known = {
        name: value * process_count() if name.rpartition(".")[2] == _PER_PROCESS else value
        for name, value in flatten(settings)
        if name.rpartition(".")[2] not in _NO_WEIGHT
    }
    if teacher is not None:
        known["teacher's weights"] = hash_teacher(teacher)
    known |= extensions_of(settings, {} if teacher is None else {"model_type": teacher.config.model_type})
    known["training rows"] = hash_all_columns(rows)
    if held_out is not None:
        known["held-out rows (data, evaluation.rows)"] = hash_all_columns(held_out)
    known["tokenizer"] = hash_tokenizer(tokenizer)
    known[VERSIONS] = versions()
    plain: dict[str, Any] = json.loads(json.dumps(known))
    return plain


def with_start(identity: Mapping[str, Any], student: PreTrainedModel) -> dict[str, Any]:
    """The identity of a run whose training starts from the weights of `student`."""
    return {**identity, START: hash_teacher(student)}


def hash_all_columns(rows: Dataset) -> str:
    """SHA-256 of everything in `rows`, in its order."""
    found = hashlib.sha256(str(len(rows)).encode())
    for name in sorted(rows.column_names):
        found.update(name.encode())
        for batch in rows.select_columns([name]).iter(1000):
            found.update(json.dumps(batch[name], default=str).encode())
    return found.hexdigest()


def hash_splits(*parts: Mapping[str, Dataset]) -> str:
    """SHA-256 of everything in several splits, by name, as of a task's rows to measure on and their right answers."""
    found = hashlib.sha256()
    for splits in parts:
        for name in sorted(splits):
            found.update(f"{name} {hash_all_columns(splits[name])}\n".encode())
    return found.hexdigest()


def write_identity(file: Path, identity: Mapping[str, Any]) -> None:
    """Keep it, on disk when this returns."""
    write_json_whole(file, dict(identity))


def check_same_run(file: Path, identity: Mapping[str, Any]) -> None:
    """Refuse to go on with the run that `write_identity` noted in `file` if it is another one; tell other versions.

    Args:
        file: of the run that was stopped.
        identity: of this run, with or without the weights that it starts from.

    Raises:
        OutputError: names each difference; or the file is not there or damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        items = dict(found)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OutputError(
            f"{file} does not say which run the checkpoints beside it are of ({error}). Start anew with --overwrite."
        ) from error
    unlike = differences(items, identity, {VERSIONS} | {START} - identity.keys())
    if unlike:
        told = "; ".join(f"{name} was {one}, is {other}" for name, one, other in unlike)
        raise OutputError(
            f"The run that was stopped is not this one: {told}. Give what that run was given to go "
            "on with it, or start anew with --overwrite and without --resume; or name another output."
        )
    if START not in identity:  # the first look: of two, one tells it
        warn_other_versions(items, identity, "The training")


def check_same_everywhere(identity: Mapping[str, Any]) -> None:
    """Refuse to train together with a first process that was given something else, as on another machine.

    Raises:
        SettingError: names each difference.
    """
    unlike = differences(from_first(lambda: identity), identity)
    if unlike:
        told = "; ".join(f"{name} is {one} there, {other} here" for name, one, other in unlike)
        raise SettingError(
            f"The processes of this run differ from its first: {told}. Give all of them the same "
            "command, files and packages."
        )


def flatten(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; the entries of a list of mappings are numbered."""
    for name, value in settings.items():
        items = {str(place): item for place, item in enumerate(value, 1)} if _is_list_of_settings(value) else value
        if isinstance(items, Mapping):
            yield from flatten(items, f"{above}{name}.")
        else:
            yield above + name, value


def _is_list_of_settings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
