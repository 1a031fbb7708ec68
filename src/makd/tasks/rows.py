"""From a task's settings to its rows: the same columns whatever the source, and labels in a known order.

After this module a classification or regression has the columns `text`, perhaps `text_pair`, and `label` (of several
labels or numbers a row, a list); a token
classification `tokens` and `tags`; question answering `question`, `context` and `answers`.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from datasets import Dataset, DatasetDict, List, Value

from makd.data import (
    check_strings,
    leave_out,
    load_splits,
    log_rows_seen,
    rename_columns,
    split_off,
    string_columns,
    validation_split,
)
from makd.errors import DataError
from makd.tasks.answer_spans import mend_places
from makd.tasks.labels import LISTS, UNLABELLED, is_multi_hot, label_names, named_values, number_of, vector_of
from makd.tasks.metrics import measurable
from makd.tasks.present import check_classes
from makd.tasks.settings import NAMED, TaskConfig

logger = logging.getLogger(__name__)

PLAIN = {
    "classification": (("text", "text_pair"), "label"),
    "multi_label": (("text", "text_pair"), "label"),
    "regression": (("text", "text_pair"), "label"),
    "token_classification": (("tokens",), "tags"),
    "question_answering": (("question", "context"), "answers"),
}
"""Kind -> what its text columns and its label column are called from here on."""
HELD_OUT = "held_out"
"""What training rows are called that are not trained on, but measured on."""
TUNING = "tuning"
"""What they are called that are measured on while settings are chosen."""
ENTITY_TAG = re.compile(r"O|[BIESLU]-.+")
WORDS_AND_TAGS = "Each row of token classification is a list of words and a list of as many tags"


@dataclass(frozen=True)
class TaskRows:
    """A task's data, not tokenized yet."""

    config: TaskConfig
    labels: tuple[str, ...]
    """Names of the classes in the data's order; of a regression with several outputs their numbers; else none."""
    train: Dataset
    evaluation: Mapping[str, Dataset]
    """By the name of the split."""
    extra: Dataset | None
    """Texts without labels."""
    may_be_none: bool = False
    """Question answering: whether a question, to learn from or to measure on, has no answer in its context."""


def read_task(config: TaskConfig) -> TaskRows:
    """The rows of a task.

    Raises:
        DataError: there is no such data, split or column, labels are missing or not of the task, their order is not the
            one that was asked for, or all rows of one split have the same one.
    """
    where = config.path or config.known.path or ""
    configuration = config.configuration or (config.known.configuration if config.path is None else None)
    splits = load_splits(where, configuration, config.train_split)
    found = _Source(config, where)
    rows = train = _limit(found.split(splits, config.train_split), config.rows)
    extra = None if config.extra_text is None else _Extra(config, _extra(config, config.extra_text))
    names = config.evaluation_splits or _official_splits(config, splits)
    if names and (names != (HELD_OUT,) or HELD_OUT in splits):
        evaluation = {name: _limit(found.split(splits, name), config.evaluation_rows) for name in names}
        for name, measured in evaluation.items():
            log_rows_seen(train, measured, f"{where}, split {name!r}", _said(config, train))
            if extra is not None:
                extra.log_seen(measured, name)
    else:
        if len(train) < 2:
            raise DataError(f"{where} has {len(train)} rows; at least 2 are needed, one of them to measure on.")
        train, held_out = split_off(train, config.held_out, "task.held_out", _said(config, train))
        extra = None if extra is None else extra.without(held_out, HELD_OUT)
        evaluation = {HELD_OUT: _limit(held_out, config.evaluation_rows)}
    if config.tuning is not None:
        # of what is left to train on, and by other digests than those by which rows are held out
        train, tuned_on = split_off(train, config.tuning, "task.tuning", _said(config, train), TUNING)
        extra = None if extra is None else extra.without(tuned_on, TUNING)
        evaluation = {TUNING: _limit(tuned_on, config.evaluation_rows)}
    labels = _read_labels(config, rows, where)  # of all: a class is one though all of its rows are held out
    _check_metrics(config, labels.names, where)
    by_text = config.known.kind == "question_answering"  # what is measured; where an answer stands is only learned
    train = _with_labels(config, train, labels, f"split {config.train_split!r} of {where}", drop=True)
    evaluation = {
        name: _with_labels(config, rows, labels, f"split {name!r} of {where}", drop=name not in splits and not by_text)
        for name, rows in evaluation.items()
    }
    if config.known.kind in NAMED:
        check_classes(labels.names, train, evaluation, {*evaluation} - {*splits}, where)
    return TaskRows(
        config=config,
        labels=labels.names,
        train=train,
        evaluation=evaluation,
        extra=None if extra is None else extra.rows,
        may_be_none=by_text and _may_be_none(config, train, evaluation, where),
    )


def _said(config: TaskConfig, rows: Dataset) -> list[str]:
    """The columns of `rows` that a model reads."""
    return [name for name in PLAIN[config.known.kind][0] if name in rows.column_names]


@dataclass(frozen=True)
class _Labels:
    """How the data's labels are read."""

    names: tuple[str, ...]
    is_multi_hot: bool


def _read_labels(config: TaskConfig, train: Dataset, where: str) -> _Labels:
    column = PLAIN[config.known.kind][1]
    if config.known.kind == "multi_label" and not isinstance(train.features[column], LISTS):
        raise DataError(
            "Several labels a row are a list of names, of numbers, or of a 0 or 1 for each label; the column of "
            f"{where} holds {train.features[column]}. One label a row is a 'classification'."
        )
    names = label_names(config, train, column, where)
    return _Labels(names, config.known.kind == "multi_label" and is_multi_hot(named_values(train, column)))


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


def _check_metrics(config: TaskConfig, labels: Sequence[str], where: str) -> None:
    """Refuse metrics that these labels have none of, which a training would be in vain for.

    Raises:
        DataError: `f1` of more than two classes, or entities of tags that are not of any.
    """
    if config.known.kind == "classification" and "f1" in config.measured and len(labels) != 2:
        raise DataError(
            f"The metric f1 is of two classes, 0 and 1; {where} has {len(labels)}: {', '.join(labels)}. Take "
            "task.metrics [macro_f1]."
        )
    if config.known.kind != "token_classification" or not any(name.startswith("entity") for name in config.measured):
        return
    strange = next((label for label in labels if not ENTITY_TAG.fullmatch(label)), None)
    if strange is not None:
        raise DataError(
            f"The tag {strange!r} is not an entity's (O, B-…, I-…), so entities cannot be counted. Name the tags with "
            "task.labels, or take task.metrics [token_accuracy]."
        )


def _with_labels(config: TaskConfig, rows: Dataset, labels: _Labels, where: str, drop: bool = False) -> Dataset:
    """`rows` whose labels are numbers: places in the names, a 0 or 1 for each, the regression's; or answers, or tags.

    `drop` those that have none.

    Raises:
        DataError: labels are not of this form, or missing: all of them, or, where none are dropped, one.
    """
    kind = config.known.kind
    column = PLAIN[kind][1]
    if kind == "question_answering":
        _check_answers(rows, where)
        rows = mend_places(rows, where, drop)
        missing = [not answers["text"] for answers in rows["answers"]]
    elif kind == "token_classification":
        rows = _with_tags(config, rows, labels.names, where)
        missing = [{*tags} <= {UNLABELLED} for tags in rows["tags"]]
    elif kind == "regression":
        rows, missing = _with_numbers(rows, column, max(1, len(labels.names)), where)
    else:
        values: list[Any] = named_values(rows, column)
        form: Any = Value("int64")
        if kind == "multi_label":
            values = [vector_of(value, labels.names, labels.is_multi_hot, where) for value in values]
            form, missing = List(Value("float32")), [value is None for value in values]
        else:
            values = [number_of(value, labels.names, where) for value in values]
            missing = [value == UNLABELLED for value in values]
        rows = rows.remove_columns(column).add_column(column, values, feature=form)
    may_lack = kind in ("question_answering", "token_classification")  # no answer is one; other words may have tags
    if not any(missing) or (may_lack and not all(missing)):
        return rows
    if drop and not all(missing):
        logger.warning(
            "%d of %d rows of %s have no label (null, or %d) and are left out",
            sum(missing),
            len(missing),
            where,
            UNLABELLED,
        )
        return rows.select([place for place, absent in enumerate(missing) if not absent])
    count = "all of them" if all(missing) else f"{sum(missing)} of {len(missing)}"
    absent = "empty" if kind == "question_answering" else UNLABELLED
    raise DataError(
        f"The labels of {where} are missing ({count} are {absent}): they are kept secret, as GLUE's tests are. "
        "Take a split that has labels."
    )


def _with_numbers(rows: Dataset, column: str, width: int, where: str) -> tuple[Dataset, list[bool]]:
    """`rows` with float32 numbers, `width` of them a row, and which rows lack one."""
    form = Value("float32") if width == 1 else List(Value("float32"))
    if width == 1 and isinstance(rows.features[column], LISTS):
        values = [None if value is None else next(iter(value), None) for value in rows[column]]
        rows = rows.remove_columns(column).add_column(column, values)
    try:
        rows = rows.cast_column(column, form)
    except (ValueError, TypeError, NotImplementedError) as error:  # pyarrow's
        raise DataError(f"The labels of a regression are numbers; those of {where} are not: {error}") from error
    lists = [[value] if width == 1 else value for value in rows[column]]
    wrong = next((value for value in lists if value is not None and len(value) != width), None)
    if wrong is not None:
        raise DataError(f"Each row of {where} has {width} numbers as labels; one has {wrong!r}.")
    infinite = sum(any(one is not None and math.isinf(one) for one in value or ()) for value in lists)
    if infinite:
        raise DataError(f"{infinite} rows of {where} have an infinite label. Leave them out, or give them a number.")
    return rows, [value is None or any(one is None or one != one for one in value) for value in lists]


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


def _may_be_none(config: TaskConfig, train: Dataset, evaluation: Mapping[str, Dataset], where: str) -> bool:
    """Whether there are questions without an answer; the name of the task does not say it of data of one's own."""
    true = {name: [answers["text"] for answers in rows["answers"]] for name, rows in evaluation.items()}
    for name, answers in true.items():
        if not measurable(config.measured, answers):
            raise DataError(
                f"There is nothing to measure by task.metrics [{', '.join(config.measured)}]: all questions of split "
                f"{name!r} of {where} have an answer. Take f1 and exact_match, too."
            )
    learned = [answers["text"] for answers in train["answers"]]
    without = sum(not answers for answers in chain(learned, *true.values()))
    if without:
        count = len(learned) + sum(map(len, true.values()))
        logger.info("%d of %d questions of %s have no answer: 'no answer' may be predicted", without, count, where)
    return without > 0


def _with_tags(config: TaskConfig, rows: Dataset, labels: Sequence[str], where: str) -> Dataset:
    tags = [[number_of(value, labels, where) for value in tags or ()] for tags in named_values(rows, "tags")]
    for words, numbers in zip(rows["tokens"], tags, strict=True):
        if words is None or len(words) != len(numbers) or not all(isinstance(word, str) for word in words):
            raise DataError(f"{WORDS_AND_TAGS}; {where} has {words!r} with {len(numbers)} tags.")
    return rows.remove_columns("tags").add_column("tags", tags)


@dataclass(frozen=True)
class _Extra:
    """Text without labels, which may be the pool that the labelled rows are of: those to measure on, too."""

    config: TaskConfig
    rows: Dataset

    def without(self, held_out: Dataset, name: str) -> "_Extra":
        """It without the rows that are held out of the training rows.

        Raises:
            DataError: none is left.
        """
        if not self._is_alike(held_out):
            return self
        left = leave_out(self.rows, held_out, _said(self.config, held_out))
        if not len(left):
            raise DataError(
                f"All {len(self.rows)} rows of task.extra_text ({self.config.extra_text}) are measured on (task."
                f"{name}), so none may be learned from. Give other text, or leave it out."
            )
        if len(left) < len(self.rows):
            logger.info(
                "%s of %s rows of task.extra_text are measured on (task.%s), and are left out",
                f"{len(self.rows) - len(left):,}", f"{len(self.rows):,}", name,
            )  # fmt: skip
        return _Extra(self.config, left)

    def log_seen(self, measured: Dataset, name: str) -> None:
        """Log how many rows of a split of the data's own are among it."""
        if self._is_alike(measured):
            where = f"task.extra_text and split {name!r}"
            log_rows_seen(self.rows, measured, where, _said(self.config, measured))

    def _is_alike(self, measured: Dataset) -> bool:
        """Whether it has the same columns: one text is not a pair that begins with it."""
        return _said(self.config, self.rows) == _said(self.config, measured)


def _extra(config: TaskConfig, where: str) -> Dataset:
    """Unlabelled rows: with the task's text columns, or else only a column `text`."""
    splits = load_splits(where)
    rows = splits[config.train_split] if config.train_split in splits else next(iter(splits.values()))
    columns = config.text_columns or config.known.text_columns or config.kind.text_columns or ("text",)
    if config.known.kind in ("classification", "multi_label", "regression") and not set(columns) <= set(
        rows.column_names
    ):
        columns = ("text",)
    return _rename(rows, config, where, columns, None)
