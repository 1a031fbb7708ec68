"""From a task's settings to its rows: the same columns whatever the source, and labels in a known order.

After this module a classification or regression has the columns `text`, perhaps `text_pair`, and `label`; a token
classification `tokens` and `tags`; question answering `question`, `context` and `answers`.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, LargeList, List, Value

from makd.data import check_strings, load_splits, rename_columns, split_off, string_columns, validation_split
from makd.errors import DataError
from makd.tasks.settings import TaskConfig

logger = logging.getLogger(__name__)

PLAIN = {
    "classification": (("text", "text_pair"), "label"),
    "regression": (("text", "text_pair"), "label"),
    "token_classification": (("tokens",), "tags"),
    "question_answering": (("question", "context"), "answers"),
}
"""Kind -> what its text columns and its label column are called from here on."""
HELD_OUT = "held_out"
"""What training rows are called that are not trained on, but measured on."""
ENTITY_TAG = re.compile(r"O|[BIESLU]-.+")
LISTS = (List, LargeList)
WORDS_AND_TAGS = "Each row of token classification is a list of words and a list of as many tags"
UNLABELLED = -1
"""What data sets have for a label that is kept secret, or that annotators did not agree on."""


@dataclass(frozen=True)
class TaskRows:
    """A task's data, not tokenized yet."""

    config: TaskConfig
    labels: tuple[str, ...]
    """Names of the classes in their order; none for numbers and answers."""
    train: Dataset
    evaluation: Mapping[str, Dataset]
    """By the name of the split."""
    extra: Dataset | None
    """Texts without labels."""


def read_task(config: TaskConfig, seed: int = 0) -> TaskRows:
    """The rows of a task.

    Raises:
        DataError: there is no such data, split or column, labels are missing or not of the task, or their order is not
            the one that was asked for.
    """
    where = config.path or config.known.path or ""
    configuration = config.configuration or (config.known.configuration if config.path is None else None)
    splits = load_splits(where, configuration, config.train_split)
    found = _Source(config, where)
    train = _limit(found.split(splits, config.train_split), config.rows)
    names = config.evaluation_splits or _official_splits(config, splits)
    if names and (names != (HELD_OUT,) or HELD_OUT in splits):
        evaluation = {name: _limit(found.split(splits, name), config.evaluation_rows) for name in names}
    else:
        if len(train) < 2:
            raise DataError(f"{where} has {len(train)} rows; at least 2 are needed, one of them to measure on.")
        train, held_out = split_off(train, config.held_out, seed, "task.held_out")
        evaluation = {HELD_OUT: _limit(held_out, config.evaluation_rows)}
    labels = _labels(config, train, where)
    return TaskRows(
        config=config,
        labels=labels,
        train=_with_labels(config, train, labels, f"split {config.train_split!r} of {where}", drop=True),
        evaluation={
            name: _with_labels(config, rows, labels, f"split {name!r} of {where}", drop=name not in splits)
            for name, rows in evaluation.items()
        },
        extra=None if config.extra_text is None else _extra(config, config.extra_text),
    )


@dataclass(frozen=True)
class _Source:
    """Where rows come from, for the texts of errors."""

    config: TaskConfig
    where: str

    def split(self, splits: DatasetDict, name: str) -> Dataset:
        """The split, with plain columns."""
        if name not in splits:
            setting = "task.train_split" if name == self.config.train_split else "task.evaluation_splits"
            raise DataError(f"{self.where} has no split {name!r}; it has {', '.join(splits)}. Name one with {setting}.")
        rows = splits[name]
        known = self.config.known
        columns = self.config.text_columns or known.text_columns or self.config.kind.text_columns or self._guess(rows)
        label = self.config.label_column or self.config.kind.label_column
        return _rename(rows, self.config, self.where, columns, label)

    def _guess(self, rows: Dataset) -> tuple[str, ...]:
        label = self.config.label_column or self.config.kind.label_column
        strings = [name for name in string_columns(rows) if name != label]
        if "text" in strings:
            return ("text",)
        if len(strings) == 1:
            return (strings[0],)
        raise DataError(
            f"Say which columns of {self.where} to read, one or a pair, with task.text_columns; it has "
            f"{', '.join(rows.column_names)}."
        )


def _rename(rows: Dataset, config: TaskConfig, where: str, columns: Sequence[str], label: str | None) -> Dataset:
    """`rows` with plain names, and nothing but the columns that are asked for."""
    texts, target = PLAIN[config.known.kind]
    names = dict(zip(columns, texts, strict=False)) | ({} if label is None else {label: target})
    missing = [name for name in names if name not in rows.column_names]
    if missing:
        settings = "task.text_columns and task.label_column"
        raise DataError(
            f"{where} has no column {', '.join(map(repr, missing))}; it has {', '.join(rows.column_names)}. "
            f"Name them with {settings}."
        )
    if config.known.kind != "token_classification":
        check_strings(rows, columns, where)
    else:
        for name in names:
            if not isinstance(rows.features[name], LISTS):
                raise DataError(f"{WORDS_AND_TAGS}; the column {name!r} of {where} holds {rows.features[name]}.")
    return rename_columns(rows, names)


def _official_splits(config: TaskConfig, splits: DatasetDict) -> tuple[str, ...]:
    if config.known.evaluation_splits is not None and set(config.known.evaluation_splits) <= set(splits):
        return config.known.evaluation_splits
    found = validation_split(splits)
    if found is None and len(splits) > 1:
        logger.warning(
            "There is no split for validation (%s): %.0f %% of the training rows are held out. Name another split with "
            "task.evaluation_splits.",
            ", ".join(splits),
            100 * config.held_out,
        )
    return () if found is None else (found,)


def _limit(rows: Dataset, count: int | None) -> Dataset:
    return rows if count is None or len(rows) <= count else rows.select(range(count))


def _labels(config: TaskConfig, train: Dataset, where: str) -> tuple[str, ...]:
    """Names of the classes: the data's own order has to be that of the settings, or of the task."""
    if config.known.kind not in ("classification", "token_classification"):
        return ()
    wanted = config.labels or config.known.labels
    column = PLAIN[config.known.kind][1]
    feature = train.features[column]
    feature = getattr(feature, "feature", feature)
    if isinstance(feature, ClassLabel):
        names = tuple(feature.names)
        if wanted is not None and wanted != names:
            asked = "task.labels asks for" if config.labels else f"{config.name} has"
            raise DataError(f"{where} has the labels {', '.join(names)}, in this order; {asked} {', '.join(wanted)}.")
        return names
    if wanted is not None:
        return wanted
    found = _distinct(train[column])
    if len(found) < 2:
        raise DataError(
            f"All training rows of {where} have the label {found[0]!r}; there is nothing to tell apart. "
            f"({UNLABELLED} stands for no label.)"
        )
    if all(isinstance(label, int) for label in found):
        found = range(max(found) + 1)
    logger.info("labels of %s, in this order: %s", where, ", ".join(map(str, found)))
    return tuple(map(str, found))


def _distinct(values: Sequence[Any]) -> Any:
    flat = {value for item in values for value in (item if isinstance(item, list) else [item])}
    # whole numbers of a csv file with some missing are read as 0.0, 1.0
    flat = {
        int(value) if isinstance(value, float) and value.is_integer() else value for value in flat if value == value
    }
    flat -= {None, UNLABELLED}
    if not flat:
        raise DataError("No training row has a label.")
    if len({type(value) for value in flat}) > 1 or not isinstance(next(iter(flat)), str | int):
        shown = ", ".join(repr(value) for value in list(flat)[:3])
        raise DataError(
            f"Labels of classes are names or whole numbers from 0; these are {shown}, … Is it a regression?"
        )
    return sorted(flat)


def _with_labels(config: TaskConfig, rows: Dataset, labels: Sequence[str], where: str, drop: bool = False) -> Dataset:
    """`rows` whose labels are numbers: places in `labels`, or the regression's. `drop` those that have none."""
    kind = config.known.kind
    column = PLAIN[kind][1]
    if kind == "question_answering":
        _check_answers(rows, where)
        return rows
    if kind == "token_classification":
        return _with_tags(config, rows, labels, where)
    if kind == "regression":
        try:
            rows = rows.cast_column(column, Value("float32"))
        except (ValueError, TypeError, NotImplementedError) as error:  # pyarrow's
            raise DataError(f"The labels of a regression are numbers; those of {where} are not: {error}") from error
        missing = [value is None or value != value for value in rows[column]]
    else:
        numbers = [_number(value, labels, where) for value in rows[column]]
        rows = rows.remove_columns(column).add_column(column, numbers).cast_column(column, Value("int64"))
        missing = [number == UNLABELLED for number in numbers]
    if not any(missing):
        return rows
    if drop and not all(missing):
        logger.info("%d rows of %s have no label and are left out", sum(missing), where)
        return rows.select([place for place, absent in enumerate(missing) if not absent])
    count = "none" if all(missing) else f"{sum(missing)} of {len(missing)}"
    raise DataError(
        f"The labels of {where} are missing ({count if count != 'none' else 'all of them'} are {UNLABELLED}): they are "
        "kept secret, as GLUE's tests are. Take a split that has labels."
    )


def _number(value: Any, labels: Sequence[str], where: str) -> int:
    """The place of a label, which is a place already or a name; `UNLABELLED` where there is none."""
    if value is None or value != value:
        return UNLABELLED
    if isinstance(value, str):
        if value in labels:
            return labels.index(value)
    elif isinstance(value, list):
        raise DataError(f"A classification has one label a row; the {where} has {value!r}.")
    elif value == UNLABELLED or (value == int(value) and 0 <= value < len(labels)):
        return int(value)
    raise DataError(
        f"The {where} has the label {value!r}; the task's {len(labels)} labels are {', '.join(labels)}, "
        "numbered from 0."
    )


def _check_answers(rows: Dataset, where: str) -> None:
    absent = next((name for name in PLAIN["question_answering"][0] if None in rows[name]), None)
    if absent is not None:
        raise DataError(f"Every row of question answering has a {absent}; in the {where} one has none.")
    feature = rows.features["answers"]
    parts = feature if isinstance(feature, Mapping) else {}
    if not all(isinstance(parts.get(name), LISTS) for name in ("text", "answer_start")):
        raise DataError(
            f"Answers are as SQuAD has them, a list of texts and of the characters where they begin, such as "
            f'{{"text": ["Paris"], "answer_start": [17]}}, empty where there is none; those of {where} are {feature}.'
        )


def _with_tags(config: TaskConfig, rows: Dataset, labels: Sequence[str], where: str) -> Dataset:
    column = rows["tags"]
    tags = [[_number(value, labels, where) for value in tags or ()] for tags in column]
    for words, numbers in zip(rows["tokens"], tags, strict=True):
        if words is None or len(words) != len(numbers) or not all(isinstance(word, str) for word in words):
            raise DataError(f"{WORDS_AND_TAGS}; {where} has {words!r} with {len(numbers)} tags.")
    strange = next((label for label in labels if not ENTITY_TAG.fullmatch(label)), None)
    if strange is not None and any(name.startswith("entity") for name in config.measured):
        raise DataError(
            f"The tag {strange!r} is not an entity's (O, B-…, I-…), so entities cannot be counted. Name the tags with "
            "task.labels, or take task.metrics [token_accuracy]."
        )
    return rows.remove_columns("tags").add_column("tags", tags)


def _extra(config: TaskConfig, where: str) -> Dataset:
    """Unlabelled rows: with the task's text columns, or else only a column `text`."""
    splits = load_splits(where)
    rows = splits[config.train_split] if config.train_split in splits else next(iter(splits.values()))
    columns = config.text_columns or config.known.text_columns or config.kind.text_columns or ("text",)
    if config.known.kind in ("classification", "regression") and not set(columns) <= set(rows.column_names):
        columns = ("text",)
    return _rename(rows, config, where, columns, None)
