"""Station 6: training from a cache. The teacher's outputs on a batch's rows, in the form that its forward gives it.

Shards are mapped into memory: what is read is what a batch needs, and the system keeps what it has room for.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

from makd.anatomy import Anatomy
from makd.aspects import ActivePlan, KeptPredictions, PooledTexts
from makd.cache.encoding import SCALE, decode_into
from makd.cache.identity import identify
from makd.cache.parts import PREDICTIONS, check_top_k, missing, names, needs, real_tokens
from makd.cache.write import FINISHED, FORMAT, UNFINISHED
from makd.capture import AttentionCall, Recording, has_vocabulary_head
from makd.errors import CacheError, DataError
from makd.identities import differences
from makd.plain_json import read_json


class CachedTeacherOutput(NamedTuple):
    """A teacher's side of a batch, as its forward would have left it."""

    recording: Recording
    output: Any
    """`PooledTexts`, a ModelOutput with logits over labels, or None where nothing asks for them."""
    predictions: KeptPredictions | None
    """Over a vocabulary."""


class _Place(NamedTuple):
    shard: int
    position: int


@dataclass(frozen=True)
class _Layout:
    """Where the entries of a batch's rows are in the shards, and where they go in the batch."""

    shape: tuple[int, ...]
    """Of the batch along its rows and tokens, or its texts."""
    pieces: Sequence[tuple[int, slice, slice | Tensor]]
    """(shard, entries in it, flat places in the batch)"""
    is_full: bool
    """Whether every place gets an entry."""


class TeacherCache:
    """A teacher's outputs on the rows of one data set: made by `makd cache`, read by the Trainer."""

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        """Use `open`, which makes sure that the cache is of the teacher and data at hand."""
        self.folder = folder
        self.content = content
        """What `cache.json` says."""
        of_no_weight = ("versions", "shards", "bytes")
        known = {name: value for name, value in content.items() if name not in of_no_weight}
        self.identity = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
        """SHA-256 of what the cache is of and how it is stored; the same for one that was made anew or moved."""
        self.dtype: torch.dtype = getattr(torch, content["dtype"])
        self._shards: list[dict[str, Tensor]] = []
        self._axes: dict[str, str] = {}
        self._places: dict[int, _Place] = {}
        for name in content["shards"]:
            self._map(folder / name)

    @staticmethod
    def open(
        folder: str | Path,
        teacher: PreTrainedModel,
        rows: Sequence[Mapping[str, Any]] | Dataset,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_length: int | None = None,
    ) -> "TeacherCache":
        """The cache in `folder`, which has to be of this teacher and of these rows in this order.

        Args:
            folder: as `makd cache` wrote it.
            teacher: its weights are hashed, and compared with those that the cache was made of.
            rows: the tokenized training rows, likewise.
            tokenizer: compared too, if given.
            max_length: compared too, if given.

        Raises:
            CacheError: it is not there, not finished, damaged, or of something else; the text says of what.
        """
        folder = Path(folder).expanduser()
        if not (folder / FINISHED).is_file():
            state = "holds an unfinished cache" if (folder / UNFINISHED).is_file() else "holds no teacher cache"
            raise CacheError(f"{folder} {state if folder.is_dir() else 'does not exist'}. `makd cache` makes one.")
        content = read_json(folder / FINISHED, dict, CacheError, "Make it anew with `makd cache`.")
        wanted = {"format": FORMAT, **identify(teacher, rows, tokenizer, max_length)}
        unlike = differences({name: content.get(name) for name in wanted}, wanted)
        if unlike:
            name, one, other = unlike[0]
            raise CacheError(
                f"The cache {folder} is stale: its {name} is {one}, here it is {other}. Make it anew with "
                "`makd cache`, with the teacher, data, tokenizer and seed of this run; or train without a cache."
            )
        _check_note(folder, content)
        try:
            return TeacherCache(folder, content)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise CacheError(f"The cache {folder} is damaged: {error}. Make it anew with `makd cache`.") from error

    def __len__(self) -> int:
        """Rows."""
        return len(self._places)

    def check_plan(self, plan: ActivePlan, student: PreTrainedModel) -> None:
        """Refuse a `plan` that compares with something that the cache does not have.

        Raises:
            CacheError: a part that `plan` needs is not in the cache; the text says which aspect asks for it.
            SettingError: the student's predictions cannot be compared with kept ones.
        """
        for need in needs(plan, student):
            if need.part not in self._axes:
                raise CacheError(
                    f"The cache {self.folder} lacks what the aspect {need.aspect!r} compares with: {need.part}. It was "
                    f"made for another plan. Make one for this plan with `makd cache`, or leave out {need.aspect!r}."
                )
        kept, vocabulary = self.content["settings"]["top_k"], self.content["vocabulary"]
        check_top_k(plan, student, kept, vocabulary, f"the cache {self.folder}")
        if any(active.place == "predictions" for active in plan.terms) and has_vocabulary_head(student):
            size = student.get_output_embeddings().out_features
            if size < self.content["vocabulary"]:
                raise CacheError(
                    f"The cache {self.folder} has predictions of {self.content['vocabulary']} tokens, the student "
                    f"makes {size}. Train without a cache, or with a student of the whole vocabulary."
                )

    def recall(
        self, rows: Sequence[int], plan: ActivePlan, anatomy: Anatomy, inputs: Mapping[str, Tensor]
    ) -> CachedTeacherOutput:
        """The teacher's outputs on `rows`, laid out as in `inputs`; zeros in its padding.

        Args:
            rows: index in the data set of each row of the batch, in the batch's order.
            plan: what is compared: `check_plan` was fine with it.
            anatomy: of the teacher.
            inputs: the batch. A row's tokens follow each other in it, row after row, padded on either side or not.

        Raises:
            DataError: the batch does not have the tokens that the cache has of these rows.
        """
        batch = _Batch(self, rows, inputs)
        recording, predictions = Recording(), None
        output: Any = None
        for tap in plan.teacher_taps:
            tensors = [batch.read(name, self.dtype) for name in names(tap)]
            if len(tensors) == 1:
                recording.tensors[tap] = tensors[0]
            else:
                query, key = (tensor.transpose(1, 2) for tensor in tensors)
                # masks and bounds are the student's: both read the same batch
                recording.attention[tap] = AttentionCall(query, key, None, False, query.shape[-1] ** -0.5, None, None)
        places = {active.place for active in plan.terms}
        if "embedding" in places:
            poolings = {active.term.pooling for active in plan.terms if active.place == "embedding"}
            output = PooledTexts({pooling: batch.read(f"embedding.{pooling}", torch.float32) for pooling in poolings})
        elif "predictions" in places and f"{PREDICTIONS}.tokens" in self._axes:
            predictions = self._predictions(batch, plan)
        elif "predictions" in places and "logits" in self._axes:
            output = SequenceClassifierOutput(logits=batch.read("logits", self.dtype))
        elif "predictions" in places:
            start, end = (batch.read(name, self.dtype) for name in ("start_logits", "end_logits"))
            output = QuestionAnsweringModelOutput(start_logits=start, end_logits=end)
        return CachedTeacherOutput(recording, output, predictions)

    def _predictions(self, batch: "_Batch", plan: ActivePlan) -> KeptPredictions:
        temperatures = {active.term.temperature for active in plan.terms if active.place == "predictions"}
        return KeptPredictions(
            self.content["vocabulary"],
            batch.read(f"{PREDICTIONS}.tokens", torch.int64),
            batch.read(f"{PREDICTIONS}.log_probabilities", torch.float32),
            {each: batch.read(f"{PREDICTIONS}.{missing(each)}", torch.float32) for each in temperatures},
        )

    def _map(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self._axes |= file.metadata()
            shard = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a handle, not a dict
        for position, row in enumerate(shard["rows"].tolist()):
            self._places[row] = _Place(len(self._shards), position)
        self._shards.append(shard)

    def axis(self, part: str) -> str:
        """What a part has one entry for: `text`, `encoder` or `decoder`."""
        return self._axes[part]

    def entries(self, row: int, axis: str) -> tuple[int, int, int]:
        """(shard, first, last + 1) of a row's entries along an axis."""
        place = self._places[row]
        if axis == "text":
            return place.shard, place.position, place.position + 1
        first, last = self._shards[place.shard][f"offsets.{axis}"][place.position : place.position + 2].tolist()
        return place.shard, first, last

    def stored(self, shard: int, part: str) -> tuple[Tensor, Tensor | None]:
        """A part of a shard, mapped, and the factors of its int8 numbers."""
        tensors = self._shards[shard]
        return tensors[part], tensors.get(part + SCALE)


class _Batch:
    """The rows of one batch. Where they lie is found once for each stack."""

    def __init__(self, cache: TeacherCache, rows: Sequence[int], inputs: Mapping[str, Tensor]) -> None:
        self.cache, self.rows, self.inputs = cache, rows, inputs
        self.layouts: dict[str, _Layout] = {}

    def read(self, part: str, dtype: torch.dtype) -> Tensor:
        """A part of all rows, laid out as the batch, on its device."""
        axis = self.cache.axis(part)
        if axis not in self.layouts:
            self.layouts[axis] = self._lay_out(axis)
        layout = self.layouts[axis]
        like, _ = self.cache.stored(layout.pieces[0][0], part)
        make = torch.empty if layout.is_full else torch.zeros
        room = make((*layout.shape, *like.shape[1:]), dtype=dtype)
        flat = room.flatten(0, len(layout.shape) - 1)
        for shard, entries, places in layout.pieces:
            values, scale = self.cache.stored(shard, part)
            scale = None if scale is None else scale[entries]
            if isinstance(places, slice):
                decode_into(flat[places], values[entries], scale)
            else:
                flat[places] = _decoded(values[entries], scale, dtype)
        return room.to(self.inputs["input_ids"].device)

    def _lay_out(self, axis: str) -> _Layout:
        found = [self.cache.entries(row, axis) for row in self.rows]
        if axis == "text":
            texts = [(shard, slice(a, b), slice(i, i + 1)) for i, (shard, a, b) in enumerate(found)]
            return _Layout((len(self.rows),), texts, True)
        mask = real_tokens("decoder" if axis == "decoder" else "encoder", self.inputs).cpu()
        lengths = [last - first for _, first, last in found]
        by_row = mask.sum(1).tolist()
        if sum(by_row) != sum(lengths) or (len(by_row) == len(lengths) and by_row != lengths):
            raise DataError(
                f"The batch has {by_row} real tokens where the cache {self.cache.folder} has {lengths}, of rows "
                f"{list(self.rows)}. Train with the rows and the collator that the cache was made with."
            )
        places = mask.flatten().nonzero().squeeze(-1).split(lengths)
        pieces = [
            (shard, slice(first, last), _as_slice(place))
            for (shard, first, last), place in zip(found, places, strict=True)
        ]
        return _Layout(tuple(mask.shape), pieces, bool(mask.all()))


def _as_slice(places: Tensor) -> slice | Tensor:
    """Places that follow each other, as a slice."""
    if len(places) == 0:
        return slice(0, 0)
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else places


def _decoded(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    room = torch.empty(values.shape, dtype=dtype)
    decode_into(room, values, scale)
    return room


def _check_note(folder: Path, content: Mapping[str, Any]) -> None:
    """Refuse a `cache.json` that lacks what is looked up in it, or has it of another kind.

    Raises:
        CacheError: an entry is missing or of another kind.
    """
    shards, settings = content.get("shards"), content.get("settings")
    if not isinstance(shards, list) or not all(isinstance(name, str) and Path(name).name == name for name in shards):
        raise _damaged(folder, f"{FINISHED} has no list of files beside it under `shards`")
    if not isinstance(settings, dict) or not isinstance(settings.get("top_k"), int):
        raise _damaged(folder, f"{FINISHED} has no `settings` with `top_k`")
    if not isinstance(content.get("vocabulary"), int | None) or "vocabulary" not in content:
        raise _damaged(folder, f"{FINISHED} has no `vocabulary`")
    if not isinstance(getattr(torch, str(content.get("dtype")), None), torch.dtype):
        raise _damaged(folder, f"{FINISHED} has no `dtype`")


def _damaged(folder: Path, what: str) -> CacheError:
    return CacheError(f"The cache {folder} is damaged: {what}. Make it anew with `makd cache`.")
