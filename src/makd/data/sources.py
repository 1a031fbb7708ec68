"""Station 2: from a name to texts. A hub id, a folder, a file and the built-in text all go through the same code.

After this module every source is a `datasets.Dataset` with the column `text`, and for pairs `text_pair`; or of
conversations, as `makd.data.conversations` makes them. Text with labels is a task: see `makd.tasks`.
"""

import logging
import pydoc_data.topics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from makd.data.as_written import as_written
from makd.data.conversations import MESSAGES, as_conversations, find_columns
from makd.data.folders import check_whole
from makd.data.guess import check_strings, guess_text
from makd.data.held_out import HELD_OUT_SEED, log_rows_seen, split_off
from makd.data.mixture import apportion, mix
from makd.data.settings import AUTO, BUILT_IN, DataConfig
from makd.data.stream import draw_splits
from makd.errors import DataError
from makd.kinds import HALF, half_letter
from makd.mapped import filter_rows

logger = logging.getLogger(__name__)

PASSAGE_WORDS = 40
"""Paragraphs of the built-in text are joined until a passage has this many words."""
HELD_OUT_EVERY = 6
"""Each sixth passage of the built-in text is for evaluation."""
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Texts:
    """Training and evaluation rows: `text`, and for pairs `text_pair`; or conversations."""

    train: Dataset
    evaluation: Dataset
    held_out_of: tuple[int, ...] = ()
    """Of a mixture: evaluation rows of each source, which stand one source after the other."""

    def first_held_out(self, count: int) -> Dataset:
        """At most `count` evaluation rows, the first ones; of a mixture the first of each source, in its share."""
        most = len(self.evaluation)
        if not self.held_out_of or count >= most:
            return _limit(self.evaluation, count)
        begins = accumulate(self.held_out_of, initial=0)
        parts = apportion(count, [Fraction(rows, most) for rows in self.held_out_of])
        return self.evaluation.select(
            [begin + place for begin, part in zip(begins, parts, strict=False) for place in range(part)]
        )


def load_texts(config: DataConfig, seed: int = 0) -> Texts:
    """The rows that `config` names, without blank texts.

    Args:
        config: where they are.
        seed: of which rows are taken to train on, where not all are. Those to evaluate on are the same for every seed.

    Raises:
        DataError: there is nothing at `path`, a split or column is missing, or no text is left.
    """
    found = _mix(config, seed) if config.mixture else _load(config, seed)
    _check_is_read(found.train, config)
    log_rows_seen(found.train, found.evaluation, ", ".join(config.paths))
    return found


def _check_is_read(rows: Dataset, config: DataConfig) -> None:
    """Refuse settings of conversations where there are none: they would do nothing."""
    if config.path == BUILT_IN and config.held_out != DataConfig.held_out:
        raise DataError(
            f"data.held_out is {config.held_out}, and of {BUILT_IN} every {HELD_OUT_EVERY}th passage is held out. "
            "Leave it out."
        )
    given = [name for name, plain in (("template", AUTO), ("system", None)) if getattr(config, name) != plain]
    if given and MESSAGES not in rows.column_names:
        raise DataError(
            f"data.{given[0]} is {getattr(config, given[0])!r}, which is for conversations, and "
            f"{', '.join(config.paths)} is read as plain text. Name its conversations (data.messages_column, "
            "or data.prompt_columns and "
            f"data.response_column), or leave data.{given[0]} out."
        )


def _load(config: DataConfig, seed: int) -> Texts:
    """The rows of one source."""
    if config.place == BUILT_IN:
        passages = list(dict.fromkeys(_passages()))
        held_out = passages[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
        train = [text for index, text in enumerate(passages) if index % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
        train_rows, evaluation = Dataset.from_dict({"text": train}), Dataset.from_dict({"text": held_out})
        return Texts(_limit(train_rows, config.rows), evaluation)
    if config.stream:
        splits: Mapping[str, Dataset] = _draw(config, seed)
    else:
        splits = load_splits(config.place, config.name, config.train_split)
    name = _evaluation_split(splits, config)
    train = _read(splits[config.train_split], config, config.rows)
    if name is not None:
        return Texts(train, _read(splits[name], config))
    return Texts(*split_off(train, config.held_out, "data.held_out"))


def _evaluation_split(splits: Iterable[str], config: DataConfig) -> str | None:
    """Which split is for evaluation, if any; the one to train on is there."""
    there = list(splits)
    name = config.evaluation_split or validation_split(there) or ("test" if "test" in there else None)
    for each in (config.train_split, name):
        if each is not None and each not in there:
            raise DataError(f"{config.place} has no split {each!r}; it has {', '.join(there)}.")
    return name


def _draw(config: DataConfig, seed: int) -> Mapping[str, Dataset]:
    """The splits of a stream, of each as many rows as are used."""
    count = config.rows or 1

    def draw(splits: Mapping[str, IterableDataset]) -> DatasetDict:
        name = _evaluation_split(splits, config)
        if name is None:  # some of them will be held out
            return draw_splits(splits, {config.train_split: (count, HELD_OUT_SEED)})
        held_out = max(1, round(config.held_out * count))
        return draw_splits(splits, {name: (held_out, HELD_OUT_SEED), config.train_split: (count, seed)})

    drawn: Mapping[str, Dataset] = _open(config.place, config.name, config.train_split, draw, streaming=True)
    return drawn


def _mix(config: DataConfig, seed: int) -> Texts:
    parts = [_load(config.of_source(source), seed) for source in config.mixture]
    weights = [source.weight for source in config.mixture]
    train, _ = mix([part.train for part in parts], weights, config.paths, config.rows, seed)
    held_out = mix([part.evaluation for part in parts], weights, config.paths, None, HELD_OUT_SEED)
    return Texts(train, *held_out)


def _read(rows: Dataset, config: DataConfig, limit: int | None = None) -> Dataset:
    """At most `limit` rows, of texts or of conversations."""
    columns = find_columns(rows, config)
    if columns is None:
        return _limit(_plain_columns(rows, config), limit)
    return as_conversations(_limit(rows, limit), columns, config.place)


def load_splits(name: str, configuration: str | None = None, file_split: str = "train") -> DatasetDict:
    """All splits of the data set `name`: a hub id, a folder, or a file, which is one split called `file_split`.

    Raises:
        DataError: there is nothing, or nothing that `datasets` can read.
    """
    return _open(name, configuration, file_split, DatasetDict)


def _open(
    name: str,
    configuration: str | None,
    file_split: str,
    read: Callable[[Any], DatasetDict],
    **settings: Any,
) -> DatasetDict:
    """What `read` makes of what `datasets` opens, with its `settings`; what fails there is told in one line."""
    path = Path(name).expanduser()
    if path.name in ("", ".."):  # datasets calls what it reads by the folder's name
        path = path.resolve()
    try:
        if path.is_file():
            if path.suffix not in FILE_FORMATS:
                raise DataError(f"{name}: known files are {', '.join(FILE_FORMATS)}; got {path.suffix!r}.")
            if path.stat().st_size == 0:
                raise DataError(f"{name} is empty.")
            if configuration is not None:
                raise DataError(
                    f"{name} is a file, which has no configurations; got {configuration!r}. Leave the name out, or "
                    "give the folder or hub id that has it."
                )
            files = {"data_files": {file_split: str(path)}, **settings}
            load = partial(load_dataset, FILE_FORMATS[path.suffix], **files)
            return read(as_written(load(), load))
        if not path.exists() and not _may_be_hub_id(name):
            raise DataError(f"{name} does not exist. Give a folder, a file or a hub id.")
        if path.is_dir():
            check_whole(path, configuration)
        load = partial(load_dataset, str(path) if path.is_dir() else name, configuration, **settings)
        return read(as_written(load(), load))
    except DataError:
        raise
    except Exception as error:  # datasets raises many types for what is not there; the cause is kept
        has_reason = isinstance(error, DatasetGenerationError) and error.__cause__ is not None
        reason = error.__cause__ if has_reason else error
        text = " ".join(str(reason).split())[:400] or type(reason).__name__
        raise DataError(
            f"No data could be loaded from {name!r}: {text} (give {BUILT_IN!r}, a hub id, a folder or a file)"
        ) from error


def _may_be_hub_id(name: str) -> bool:
    """Whether the hub could know it: `name` or `owner/name`, and what ends like a file has an owner."""
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        return False
    return "/" in name or Path(name).suffix not in FILE_FORMATS


def validation_split(splits: Iterable[str]) -> str | None:
    """The first split that is called `validation…` or `dev…`."""
    return next((split for split in splits if split.startswith(("validation", "dev"))), None)


def rename_columns(rows: Dataset, names: Mapping[str, str]) -> Dataset:
    """Only the columns that are keys of `names`, under their values."""
    rows = rows.select_columns(list(names))
    # through names that nothing has, as columns may trade theirs
    rows = rows.rename_columns({old: f"makd {new}" for old, new in names.items()})
    return rows.rename_columns({f"makd {new}": new for new in names.values()})


def hold_out(texts: Sequence[Any], config: DataConfig) -> Texts:
    """Texts in hand, or rows of columns as dicts, in two parts: `config.held_out` of them are for evaluation.

    Raises:
        DataError: fewer than two of them are not blank, one is no string, or none is left to train on; or their columns
            hold no conversations.
    """
    if texts and all(isinstance(row, Mapping) for row in texts):
        rows = _read_dicts(texts, config)
        _check_is_read(rows, replace(config, path="the rows in hand"))
        return Texts(*split_off(rows, config.held_out, "data.held_out"))
    odd = next((text for text in texts if not isinstance(text, str | None)), None)
    if odd is not None:
        raise DataError(f"Texts in hand are strings; one of them is {str(odd)[:80]!r}, of type {type(odd).__name__}.")
    half = half_letter(texts)
    if half is not None:
        raise DataError(f"Texts in hand are Unicode; number {half} is not. {HALF}")
    rows = _without_blank(Dataset.from_dict({"text": list(texts)}), "the texts")
    return Texts(*split_off(rows, config.held_out, "data.held_out"))


def _read_dicts(given: Sequence[Mapping[str, Any]], config: DataConfig) -> Dataset:
    half = next((number for number, row in enumerate(given) if half_letter(row.values()) is not None), None)
    if half is not None:
        raise DataError(f"The rows in hand hold texts; of row {half} one is none. {HALF}")
    names = dict.fromkeys(name for row in given for name in row)  # `datasets` would take those of the first row alone
    try:
        rows = Dataset.from_list([{name: row.get(name) for name in names} for row in given])
    except (ValueError, TypeError) as error:
        raise DataError(f"The rows in hand do not hold the same in the same columns: {error}.") from error
    return _read(rows, replace(config, path="the rows in hand"))


def _passages() -> Iterator[str]:
    """Passages of the built-in text, in the order of its topics. Some topics quote each other word for word."""
    for name in sorted(pydoc_data.topics.topics):
        words: list[str] = []
        for paragraph in pydoc_data.topics.topics[name].split("\n\n"):
            words += paragraph.split()
            if len(words) >= PASSAGE_WORDS:
                yield " ".join(words)
                words = []
        if words:
            yield " ".join(words)


def _plain_columns(rows: Dataset, config: DataConfig) -> Dataset:
    """Only `text` and `text_pair`, without rows whose text is blank."""
    columns = config.text_columns or (guess_text(rows, config.place),)
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise DataError(
            f"{config.place} has no column {', '.join(map(repr, missing))}; it has {', '.join(rows.column_names)}."
        )
    check_strings(rows, columns, config.place)
    if config.text_columns is None and columns != ("text",):
        logger.info("texts of %s are read from its column %r", config.place, columns[0])
    rows = rename_columns(rows, dict(zip(columns, ("text", "text_pair"), strict=False)))
    rows = _without_blank(rows, f"{config.place}, column {columns[0]!r},")
    if len(rows) == 0:
        raise DataError(f"{config.place} holds no text: every row of column {columns[0]!r} is blank.")
    return rows


def _without_blank(rows: Dataset, where: str) -> Dataset:
    """The rows whose `text` is neither null nor blank; how many are not is logged."""
    kept = filter_rows(rows, _has_text)
    if len(kept) < len(rows):
        nulls = sum(text is None for text in rows["text"])
        told = (len(rows) - len(kept), len(rows), where, nulls)
        logger.log(
            logging.WARNING if nulls else logging.INFO, "%d of %d rows of %s hold no text (%d null): left out", *told
        )
    return kept


def _has_text(row: dict[str, Any]) -> bool:
    return isinstance(row["text"], str) and bool(row["text"].strip())


def _limit(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None or len(rows) <= count else rows.select(range(count))
