"""Station 2: what `datasets` reads otherwise than it was written.

Names in csv files that pandas takes for nothing: a class None, a country NA, a language nan. And the mark by which
Windows tells UTF-8, which is no letter of the first text.
"""

from collections.abc import Callable
from typing import Any

from datasets import DatasetDict

from makd.data.guess import string_columns

NOTHING = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
)
"""What pandas reads as a missing value, unasked."""


BYTE_ORDER_MARK = "\ufeff"


def as_written(found: Any, again: Callable[..., DatasetDict]) -> Any:
    """`found`, but of csv files columns of texts have what was written: only empty fields are missing there.

    Columns of numbers stay as they are, with `NA` for a number that is missing. They are told apart by a first reading,
    and where it leaves nothing out of columns of texts there is no second. A text file's first text is without a byte
    order mark.

    Args:
        found: splits as `datasets` reads them; a stream's are given back.
        again: reads them with more settings of `datasets`' reader of the format.
    """
    if not isinstance(found, DatasetDict):
        return found
    first = next(iter(found.values()))
    if first.builder_name == "text":
        marked = any(rows["text"][0].startswith(BYTE_ORDER_MARK) for rows in found.values() if len(rows))
        return again(encoding="utf-8-sig") if marked else found
    texts = string_columns(first) if first.builder_name == "csv" else []
    if not any(rows.data.column(name).null_count for rows in found.values() for name in texts):
        return found
    missing = {name: [""] if name in texts else [*NOTHING] for name in first.column_names}
    return again(keep_default_na=False, na_values=missing)
