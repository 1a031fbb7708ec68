"""Station 6: building a cache. The teacher reads every row once, shortest rows first, and what it says goes to shards.

    unfinished.json                    what the work is of: only the same may continue it
    00000000-00000512.safetensors      a shard: rows 0 to 511 in the order of their length
    cache.json                         when all shards are there: what the cache is of, and what is in it

A shard has `rows` (indices in the data set), for each stack `offsets.encoder` or `offsets.decoder` (where a row's
tokens begin), and the parts, row after row. It gets its name when it is whole. Several processes each read a part of
the rows and write its shards; the first writes all else.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from makd.anatomy import resolve
from makd.anatomy.key_cache import without_cache
from makd.anatomy.padding import as_read
from makd.aspects import ActivePlan
from makd.cache.parts import Axis, Stored, extract, needs, real_tokens
from makd.cache.settings import CacheConfig
from makd.cache.shares import Span, find_gaps, split_between_processes
from makd.capture import capture, has_vocabulary_head, withhold_logits, without_labels
from makd.errors import CacheError, SettingError
from makd.identities import differences
from makd.plain_json import read_json
from makd.processes.first import in_first, wait_for_everyone
from makd.processes.started import is_first, process_count, process_index
from makd.progress import OnProgress, Progress, nobody
from makd.whole_files import sync_file, write_json_whole

FORMAT = 2
"""Raised when older caches can no longer be read."""
UNFINISHED, FINISHED = "unfinished.json", "cache.json"
_SHARD = re.compile(r"(\d{8})-(\d{8})\.safetensors")


@torch.no_grad()
def write_cache(
    teacher: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]] | Dataset,
    collate: Callable[[list[Any]], Mapping[str, Tensor]],
    plan: ActivePlan,
    folder: Path,
    identity: Mapping[str, Any],
    settings: CacheConfig | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Keep in `folder` what `plan` needs of `teacher` on `rows`, or go on where an earlier call was stopped.

    Args:
        teacher: in eval mode, on its device.
        rows: tokenized, in the order in which a trainer will be given them.
        collate: from some of them to a padded batch.
        plan: fitted to the teacher.
        folder: gets the shards and `cache.json`; made if it is not there.
        identity: what the cache is of, as `identify` says it.
        settings: how numbers are stored.
        on_progress: called with a `Progress` after each unit of work.

    Returns:
        The content of `cache.json`.

    Raises:
        CacheError: the folder holds something else, or the unfinished cache of something else.
        SettingError: something that the plan compares with cannot be kept, or the plan needs nothing of the teacher.
        DataError: a batch has padding that no mask marks.
    """
    settings = settings or CacheConfig()
    needed = needs(plan, teacher)
    if not needed:
        raise SettingError("The plan compares nothing with the teacher, so there is nothing to cache.")
    content = {
        "format": FORMAT,
        **identity,
        "settings": asdict(settings),
        "parts": [need.part for need in needed],
    }
    gaps = find_gaps(_begin(folder, content), len(rows))
    sizes = [len(row["input_ids"]) for row in rows]
    order = sorted(range(len(rows)), key=sizes.__getitem__)
    own = split_between_processes(gaps, [sizes[row] for row in order], process_count())[process_index()]
    open_rows = sum(end - start for start, end in gaps)
    of = len(rows) - open_rows + sum(end - start for start, end in own)
    done = len(rows) - open_rows
    tell = on_progress if on_progress is not None and is_first() else nobody
    tell(Progress("cache", done, of, "rows"))
    for start, end in own:
        shard = _Shard(start)
        for positions, stored, lengths in _read(teacher, rows, order[start:end], collate, plan, settings):
            shard.add(positions, stored, lengths)
            done += len(positions)
            if shard.size >= settings.shard_megabytes * 2**20 or shard.end == end:
                shard.write(folder)
                shard = _Shard(shard.end)
            tell(Progress("cache", done, of, "rows"))
    wait_for_everyone()
    return _finish(folder, content, teacher, len(rows))


@in_first
def _finish(folder: Path, content: dict[str, Any], teacher: PreTrainedModel, rows: int) -> dict[str, Any]:
    """Say that all is there."""
    gaps = find_gaps([_span_of(path) for path in shards_of(folder)], rows)
    if gaps:
        raise CacheError(
            f"{folder} lacks rows {gaps[0][0]} to {gaps[0][1] - 1}, which another process has read. Several machines "
            "need a folder on a disk that all of them see; or start makd cache on one."
        )
    content = content | _describe(folder, teacher)
    write_json_whole(folder / FINISHED, content)
    (folder / UNFINISHED).unlink()
    return content


def take_up(folder: Path) -> None:
    """Let `write_cache` go on in a folder that it had finished, when what comes after it was stopped."""
    if (folder / FINISHED).is_file() and not (folder / UNFINISHED).is_file():
        (folder / FINISHED).replace(folder / UNFINISHED)


def shards_of(folder: Path) -> list[Path]:
    """The shards that are whole, in the order of their rows."""
    found: list[Path] = []
    end = 0
    for path in sorted(folder.glob("*.safetensors")):
        if _SHARD.fullmatch(path.name) is not None and _span_of(path)[0] >= end:
            found.append(path)
            end = _span_of(path)[1]
    return found


def _span_of(shard: Path) -> Span:
    """Which rows are in it, as its name says."""
    start, _, end = shard.stem.partition("-")
    return int(start), int(end)


@in_first
def _begin(folder: Path, content: Mapping[str, Any]) -> list[Span]:
    """Which rows are done."""
    note = folder / UNFINISHED
    wanted = json.loads(json.dumps(dict(content)))
    if note.is_file():
        found = read_json(note, dict, CacheError, f"Remove {folder} to start anew.")
        unlike = differences({name: found.get(name) for name in wanted}, wanted)
        if unlike:
            name, one, other = unlike[0]
            raise CacheError(
                f"{folder} holds an unfinished cache of something else: its {name} is {one}, this one's is "
                f"{other}. Give the settings of that build to continue it, remove the folder to start anew, or name "
                "another output."
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise CacheError(f"{folder} is not empty and holds no unfinished cache. Name another output.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json_whole(note, wanted)
    return [_span_of(path) for path in shards_of(folder)]


def _read(
    teacher: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]] | Dataset,
    order: Sequence[int],
    collate: Callable[[list[Any]], Mapping[str, Tensor]],
    plan: ActivePlan,
    settings: CacheConfig,
) -> Iterator[tuple[Sequence[int], Stored, dict[Axis, Tensor]]]:
    """Indices of some rows, what is kept of them, and how many real tokens each has for each stack."""
    anatomy = resolve(teacher)
    predicts = has_vocabulary_head(teacher)
    for start in range(0, len(order), settings.batch_size):
        chosen = order[start : start + settings.batch_size]
        batch = as_read(collate([rows[index] for index in chosen]), teacher)
        inputs = {name: value.to(teacher.device) for name, value in batch.items()}
        with (
            capture(teacher, anatomy, plan.teacher_taps) as recording,
            withhold_logits(teacher) if predicts else nullcontext() as head,
            without_cache(teacher),
        ):
            output = teacher(**without_labels(teacher, inputs, {"labels"}))
        stored = extract(plan, anatomy, inputs, recording, output, head, settings)
        used = {axis for axis, _ in stored.values() if axis != "text"}
        yield chosen, stored, {axis: real_tokens(axis, inputs).sum(1).cpu() for axis in used}


@dataclass
class _Shard:
    """Rows that will be one file."""

    start: int
    rows: list[int] = field(default_factory=list)
    parts: dict[str, list[Tensor]] = field(default_factory=dict)
    lengths: dict[Axis, list[Tensor]] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    size: int = 0

    @property
    def end(self) -> int:
        """The row that comes after."""
        return self.start + len(self.rows)

    def add(self, rows: Sequence[int], stored: Stored, lengths: Mapping[Axis, Tensor]) -> None:
        self.rows += rows
        for name, (axis, tensor) in stored.items():
            self.parts.setdefault(name, []).append(tensor)
            self.axes[name] = axis
            self.size += tensor.nbytes
        for stack, counts in lengths.items():
            self.lengths.setdefault(stack, []).append(counts)

    def write(self, folder: Path) -> None:
        tensors = {name: torch.cat(parts) for name, parts in self.parts.items()}
        tensors["rows"] = torch.tensor(self.rows)
        for axis, counts in self.lengths.items():
            tensors[f"offsets.{axis}"] = torch.cat([torch.zeros(1, dtype=torch.long), torch.cat(counts).cumsum(0)])
        path = folder / f"{self.start:08}-{self.end:08}.safetensors"
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, metadata=self.axes)
        sync_file(part)  # its name says that it is whole, after a power cut too
        part.replace(path)


def _describe(folder: Path, teacher: PreTrainedModel) -> dict[str, Any]:
    """What a reader has to know besides the shards, and what a person may want to."""
    shards = shards_of(folder)
    head = teacher.get_output_embeddings() if has_vocabulary_head(teacher) else None
    return {
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "vocabulary": None if head is None else head.out_features,
        "shards": [path.name for path in shards],
        "bytes": sum(path.stat().st_size for path in shards),
        "versions": {name: version(name) for name in ("makd", "torch", "transformers")},
    }
