"""Station 2, for tasks: which label is which. Names in the data, numbers in the rows, outputs of a head.

Labels may come as names, as numbers, or as numbers that the data has names for. Rows get numbers: places in one tuple
of names, whose order is the data's. A head's own order is another matter: see `place_outputs`.
"""

import logging
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List

from makd.errors import DataError, SettingError
from makd.tasks.settings import NAMED, TaskConfig

logger = logging.getLogger(__name__)

LISTS = (List, LargeList)
UNLABELLED = -1
"""What data sets have for a label that is kept secret, or that annotators did not agree on."""
_COUNTED = re.compile(r"(\D*)(\d+)")


def label_names(config: TaskConfig, train: Dataset, column: str, where: str) -> tuple[str, ...]:
    """Names of the classes or labels in the data's order; those of a regression with several outputs are numbers.

    Raises:
        DataError: the data's labels are not those of the settings or of the task, are not classes, or -1 may be one;
            or they are numbers most of which up to the highest no row has.
    """
    feature = train.features[column]
    if config.known.kind == "regression" and isinstance(feature, LISTS):
        width = max((len(value) for value in train[column] if value is not None), default=1)
        return tuple(map(str, range(width))) if width > 1 else ()
    if config.known.kind not in NAMED:
        return ()
    wanted, official = config.labels, config.known.labels
    feature = getattr(feature, "feature", feature)
    if isinstance(feature, ClassLabel):
        own = tuple(feature.names)
        for other, asked in ((official, f"{config.name} has"), (wanted, "task.labels asks for")):
            if other is not None and set(own) != set(other):
                raise DataError(f"{where} has the labels {', '.join(own)}; {asked} {', '.join(other)}.")
        return official or own
    if official is not None and (wanted is None or set(wanted) == set(official)):
        return official
    if config.known.kind == "multi_label" and is_multi_hot(train[column]):
        return wanted or tuple(map(str, range(len(next(value for value in train[column] if value is not None)))))
    found = distinct(train[column])
    if wanted is None:
        return _unnamed(found, config.known.kind, where)
    if UNLABELLED in found and len(found) == len(wanted):
        raise DataError(
            f"{where} has the labels {_shown(found)} for {len(wanted)} names ({', '.join(wanted)}), so {UNLABELLED} "
            f"seems to be a class. Classes are numbered from 0, and {UNLABELLED} stands for no label: number them "
            "anew, or give names instead of numbers."
        )
    return wanted


def _unnamed(found: Sequence[Any], kind: str, where: str) -> tuple[str, ...]:
    """What classes are called that have no names but their values."""
    if UNLABELLED in found:
        raise DataError(
            f"{where} has the labels {_shown(found)}: {UNLABELLED} may be a class, or stand for no label. If it stands "
            "for none, name the classes from 0 on with task.labels; if it is one, number the classes from 0."
        )
    if len(found) < 2 and (kind != "multi_label" or isinstance(found[0], str) or found[0] < 1):
        raise DataError(
            f"All training rows of {where} have the label {found[0]!r}; there is nothing to tell apart. If the data is "
            f"sorted by class, shuffle it, or take more rows (task.rows). ({UNLABELLED} stands for no label.)"
        )
    if all(isinstance(label, int) for label in found):
        found = _counted(found, where)
    _warn_alike(found, where)
    logger.info("labels of %s, in this order: %s", where, _shown(found))
    return tuple(map(str, found))


def _warn_alike(names: Iterable[Any], where: str) -> None:
    """Tell of classes whose names are the same but for blanks around them, as a data set written by hand has them."""
    alike: dict[str, list[str]] = {}
    for name in map(str, names):
        alike.setdefault(name.strip(), []).append(name)
    for several in alike.values():
        if len(several) > 1:
            logger.warning(
                "%s has %s for classes of their own: they differ in blanks alone. If it is one class, write it as one",
                where, " and ".join(map(repr, several)),
            )  # fmt: skip


def _counted(numbers: Sequence[int], where: str) -> range:
    """All classes of which some have these `numbers`, in ascending order. A few may have no row here; ids have gaps."""
    classes = range(numbers[-1] + 1)
    if numbers[0] < 0 or 2 * len(numbers) < len(classes):
        shown = [*map(str, numbers[:3]), *(["…", str(numbers[-1])] if numbers[3:] else [])]
        raise DataError(
            f"Classes are numbered from 0, without gaps; {where} has the labels {', '.join(shown)}: {len(numbers):,} "
            f"different ones, from {numbers[0]} to {numbers[-1]}. If they are codes or ids, write names, such as "
            f"'code {numbers[-1]}'; else number the classes anew, or name all of them, in order, with task.labels."
        )
    return classes


def _shown(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def distinct(values: Sequence[Any]) -> Any:
    """All labels that occur, in order: `UNLABELLED` too, if it does."""
    each = [value for item in values for value in (item if isinstance(item, list) else [item])]
    nested = next((value for value in each if isinstance(value, list | dict)), None)
    if nested is not None:
        raise DataError(f"Labels of classes are names or whole numbers from 0; these hold {nested!r}.")
    flat = set(each)
    # whole numbers of a csv file with some missing are read as 0.0, 1.0
    flat = {
        int(value) if isinstance(value, float) and value.is_integer() else value for value in flat if value == value
    }
    flat -= {None}
    if not flat - {UNLABELLED}:
        raise DataError("No training row has a label.")
    if len({type(value) for value in flat}) > 1 or not isinstance(next(iter(flat)), str | int):
        shown = ", ".join(repr(value) for value in list(flat)[:3])
        raise DataError(
            f"Labels of classes are names or whole numbers from 0; these are {shown}, … Is it a regression?"
        )
    return sort_names(flat) if isinstance(next(iter(flat)), str) else sorted(flat)


def sort_names(names: Iterable[str]) -> list[str]:
    """By the alphabet; numbers, and one word with numbers (`LABEL_2`, `LABEL_10`), by number."""
    names = sorted(names)
    try:
        return sorted(names, key=float)
    except ValueError:
        pass
    parts = [_COUNTED.fullmatch(name) for name in names]
    if all(parts) and len({part[1] for part in parts if part}) == 1:
        return sorted(names, key=lambda name: int(_COUNTED.fullmatch(name)[2]))  # type: ignore[index]
    return names


def named_values(rows: Dataset, column: str) -> list[Any]:
    """The values of a column of labels; where the data says what its numbers are called, these names.

    So that a split whose names stand in another order is read rightly.
    """
    feature = rows.features[column]
    inner = getattr(feature, "feature", feature)
    values = list(rows[column])
    if not isinstance(inner, ClassLabel):
        return values
    names = inner.names

    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(one) for one in value]
        return names[value] if value is not None and value >= 0 else value

    return [named(value) for value in values]


def number_of(value: Any, labels: Sequence[str], where: str) -> int:
    """The place of a label, which is a place already or a name; `UNLABELLED` where there is none."""
    if value is None or value != value:
        return UNLABELLED
    if isinstance(value, float) and math.isinf(value):
        raise DataError(f"A label of the {where} is infinite ({value}). Take its row out, or give it a label.")
    if isinstance(value, str):
        if value in labels:
            return labels.index(value)
    elif isinstance(value, list):
        raise DataError(
            f"A classification has one label a row; the {where} has {value!r}. Several labels a row are a task "
            "'multi_label'."
        )
    elif value == UNLABELLED or (value == int(value) and 0 <= value < len(labels)):
        return int(value)
    raise DataError(
        f"The {where} has the label {value!r}; the task's {len(labels)} labels are {', '.join(labels)}, "
        "numbered from 0."
    )


def is_multi_hot(values: Sequence[Any]) -> bool:
    """Whether lists of labels have a 0 or 1 for every label, rather than the labels that hold.

    They do where all are equally long, two or more, and hold nothing but 0 and 1. (As numbers of labels these would
    name one twice, or both labels in every row.)
    """
    rows = [value for value in values if value is not None]
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or not lengths - {0, 1}:
        return False
    return all(isinstance(one, int | float) and one in (0, 1) for row in rows for one in row)


def vector_of(value: Any, labels: Sequence[str], hot: bool, where: str) -> list[float] | None:
    """A 1 for each label that holds, else 0; None where nobody says."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise DataError(
            f"Several labels a row are a list of names, of numbers, or of a 0 or 1 for each label; the {where} has "
            f"{value!r}. One label a row is a 'classification'."
        )
    if hot:
        if len(value) != len(labels) or any(isinstance(one, str) or one not in (0, 1) for one in value):
            raise DataError(
                f"The {where} has {value!r}, which is not a 0 or 1 for each of the task's {len(labels)} labels: "
                f"{', '.join(labels)}."
            )
        return [float(one) for one in value]
    places = {number_of(one, labels, where) for one in value}
    if UNLABELLED in places:
        raise DataError(f"The {where} has {value!r}, in which a label is missing. A row without labels has none: [].")
    return [float(place in places) for place in range(len(labels))]


def place_outputs(config: TaskConfig, labels: Sequence[str], theirs: Sequence[str], name: str) -> tuple[int, ...]:
    """For each output of a head its place in the task's `labels`.

    Names say it where they are the same, in whatever order, or but for case and blanks around them; then
    `task.labels`, which has them in the head's order; and last the order of the data, which is said.

    Args:
        config: of the task.
        labels: the task's, in the order of its data.
        theirs: what the model's config calls the head's outputs; LABEL_0, … if it does not say.
        name: what to call the model.

    Raises:
        SettingError: the names are others, or contradict `task.labels`.
    """
    ours, others = list(labels), list(map(str, theirs))
    if sorted(ours) != sorted(others):  # then whatever their case and blanks: both are written by hand
        ours, others = [_plain(label) for label in ours], [_plain(label) for label in others]
    same, wanted = tuple(range(len(labels))), config.labels
    asked = None if wanted is None or tuple(wanted) == tuple(labels) else tuple(labels.index(label) for label in wanted)
    generic = [_plain(label) for label in theirs] == [f"label_{place}" for place in same]
    if generic and ours != others:
        order = asked or same
        if wanted is None and ours != list(map(str, same)):
            logger.warning(
                "%s does not say what its labels mean; they are taken in the data's order: %s. If its head has them in "
                "another order, give that with task.labels.",
                name,
                ", ".join(f"{other} = {labels[place]}" for other, place in zip(theirs, order, strict=True)),
            )
        return order
    if sorted(ours) != sorted(others) or len(set(ours)) < len(ours):
        raise SettingError(
            f"{name} has the labels {', '.join(theirs)}; the task {config.name} has {', '.join(labels)}. Take a model "
            "that was fine-tuned on this task, or name its labels as the data does, in the order of its head, in its "
            "config.json (id2label). Data without names of its own are named by task.labels."
        )
    order = tuple(ours.index(other) for other in others)
    if asked is not None and asked != order:
        raise SettingError(
            f"task.labels says that the head of {name} has the order {', '.join(wanted or ())}; its own config says "
            f"{', '.join(theirs)}. Leave task.labels out, and they are matched by these names, or correct id2label in "
            "its config.json."
        )
    if order != same:
        logger.warning(
            "%s has the labels in another order than the data (%s); they are matched by name", name, ", ".join(theirs)
        )
    return order


def number_by_outputs(rows: Dataset, order: Sequence[int]) -> Dataset:
    """`rows` whose labels are numbered as the outputs of a head; `order` has these outputs' places in the data's order.

    Args:
        rows: with `label` (a number, or a 0 or 1 for each label) or `tags`.
        order: as `place_outputs` gives it; nothing changes without one.
    """
    column = next((name for name in ("label", "tags") if name in rows.column_names), None)
    if column is None or list(order) == sorted(order):
        return rows
    output = {place: number for number, place in enumerate(order)}

    def renumbered(value: Any) -> Any:
        if isinstance(value, list) and column == "label":
            return [value[place] for place in order]
        if isinstance(value, list):
            return [output.get(tag, tag) for tag in value]
        return output.get(value, value)

    form = rows.features[column]
    values = [renumbered(value) for value in rows[column]]
    return rows.remove_columns(column).add_column(column, values, feature=form)


def _plain(label: str) -> str:
    return str(label).strip().lower()
