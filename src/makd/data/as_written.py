"""Station 2: names in csv files that pandas takes for nothing: a class None, a country NA, a language nan."""

from collections.abc import Callable
from typing import Any

from datasets import DatasetDict

from makd.data.guess import string_columns

NOTHING = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
)
"""What pandas reads as a missing value, unasked."""


def keep_names(found: Any, again: Callable[..., DatasetDict]) -> Any:
    """`found`, but of csv files columns of texts have what was written: only empty fields are missing there.

    Columns of numbers stay as they are, with `NA` for a number that is missing. They are told apart by a first reading,
    and where it leaves nothing out of columns of texts there is no second.

    Args:
        found: splits as `datasets` reads them; a stream's are given back.
        again: reads them with more settings of `datasets`' csv reader.
    """
    if not isinstance(found, DatasetDict):
        return found
    first = next(iter(found.values()))
    texts = string_columns(first) if first.builder_name == "csv" else []
    if not any(rows.data.column(name).null_count for rows in found.values() for name in texts):
        return found
    missing = {name: [""] if name in texts else [*NOTHING] for name in first.column_names}
    return again(keep_default_na=False, na_values=missing)
