"""Station 6: how a batch says which rows of the data set it is made of, whatever the order they come in.

The data set gets a column `row` with each row's index; the collator takes it off before the batch is made, and puts it
back as a tensor. So shuffling, epochs, accumulation and resuming are the Trainer's own, as ever.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from makd.errors import SettingError

ROW = "row"
"""Name of the column, and of the tensor (rows,) in a batch."""
Row = Mapping[str, Any]


def number_rows(rows: Any) -> Any:
    """`rows` with the column.

    Raises:
        SettingError: they come as a stream, so that no row has an index.
    """
    if isinstance(rows, Dataset):
        plain = rows.remove_columns(ROW) if ROW in rows.column_names else rows
        return plain.add_column(ROW, list(range(len(plain))))  # type: ignore[call-arg, unused-ignore]
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        raise SettingError(
            f"A teacher cache needs training rows with an index; {type(rows).__name__} is a stream. Give a list or a "
            "data set of a known length, or train without a cache."
        )
    return _Numbered(rows)


class _Numbered(TorchDataset[dict[str, Any]]):
    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], ROW: index}


class RowCollator:
    """A collator that hands on the rows' indices beside what another makes of the rows."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """A batch; with `ROW` where the rows have it."""
        batch = dict(self.collate([{name: value for name, value in row.items() if name != ROW} for row in rows]))
        if rows and ROW in rows[0]:
            batch[ROW] = torch.tensor([row[ROW] for row in rows])
        return batch
