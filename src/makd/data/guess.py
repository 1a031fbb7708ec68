"""Station 2: which column of some rows is the text, where nobody says so; and what columns hold at all."""

from collections.abc import Iterable
from typing import Any

from datasets import Dataset, LargeList, List

from makd.errors import DataError

STRINGS = ("string", "large_string", "string_view")
SEPARATORS = (";", "\t", "|")
"""What stands in the name of the only column of a csv file that was not separated by commas."""
ROWS_SEEN = 100
"""So many of the first rows say whether a column looks like text."""


def string_columns(rows: Dataset) -> list[str]:
    """Names of the columns that hold strings, in any of Arrow's forms: csv files and polars come as `large_string`."""
    return [name for name, feature in rows.features.items() if getattr(feature, "dtype", None) in STRINGS]


def check_strings(rows: Dataset, columns: Iterable[str], where: str) -> None:
    """Refuse columns of the data `where` that hold no text.

    Raises:
        DataError: one of `columns` holds something else than text.
    """
    for name in columns:
        kind = getattr(rows.features[name], "dtype", rows.features[name])
        if kind not in (*STRINGS, "null"):  # null: not one text in it
            text = ", ".join(string_columns(rows))
            hint = f" These hold text: {text}." if text else ""
            raise DataError(f"The column {name!r} of {where} holds {kind}, not text.{hint}{_about_chats(rows, [name])}")


def guess_text(rows: Dataset, where: str) -> str:
    """`text`, or the only column of strings, if it looks like what the rows are about.

    Raises:
        DataError: there is no such column; or its values are identifiers; or another column holds more.
    """
    if "text" in rows.column_names:
        return "text"
    strings = string_columns(rows)
    apart = [sign for sign in SEPARATORS if len(rows.column_names) == 1 and sign in rows.column_names[0]]
    if apart:
        raise DataError(
            f"{where} has one column, {rows.column_names[0]!r}: its values stand apart by {apart[0]!r}, and a csv file "
            "is read by commas. Save it with commas, or as .jsonl or .parquet."
        )
    example = (strings or rows.column_names)[0]
    hint = f"Say which to read with data.text_columns, such as '[{example}]' (it has {', '.join(rows.column_names)})."
    hint += _about_chats(rows, rows.column_names)
    if len(strings) != 1:
        raise DataError(f"{where} has no column 'text'. {hint}")
    name = strings[0]
    first = rows.select(range(min(ROWS_SEEN, len(rows))))
    values = [value for value in first[name] if value]
    if values and all(value.isascii() and len(value.split()) == 1 for value in values):
        raise DataError(
            f"{where} has no column 'text', and its only column of strings, {name!r}, holds single words like "
            f"{values[0][:40]!r}, which may be names or labels. {hint}"
        )
    nested = [other for other, feature in rows.features.items() if isinstance(feature, dict | list | List | LargeList)]
    for other in nested:
        if _amount(first[other]) > _amount(first[name]):
            raise DataError(
                f"{where} has no column 'text'; its only column of strings, {name!r}, holds less than {other!r} does. "
                f"{hint}"
            )
    return name


def _about_chats(rows: Dataset, columns: Iterable[str]) -> str:
    """What to do about columns of lists of dicts, if there are any."""
    found = [name for name in columns if _is_list_of_dicts(rows.features[name])]
    if not found:
        return ""
    return (
        f" {', '.join(map(repr, found))} looks like conversations: a causal language model reads those with "
        "data.messages_column, where each message has a role and a content."
    )


def _is_list_of_dicts(feature: Any) -> bool:
    if isinstance(feature, List | LargeList):
        return isinstance(feature.feature, dict)
    return isinstance(feature, list) and bool(feature) and isinstance(feature[0], dict)


def _amount(value: Any) -> int:
    """Characters, and whole numbers inside of lists (token ids), of all that `value` holds."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_amount, value.values()))
    try:
        parts = list(value)
    except TypeError:
        return 0
    return sum(1 if type(part) is int else _amount(part) for part in parts)
