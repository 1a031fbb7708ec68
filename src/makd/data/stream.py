"""Station 2, continued: rows from data that are too large to map. Only what is drawn is ever read."""

from collections.abc import Mapping

from datasets import Dataset, DatasetDict, IterableDataset

BUFFER = 10_000
"""Rows among which the next one is drawn: what a stream can be shuffled by without reading all of it."""


def draw_splits(splits: Mapping[str, IterableDataset], wanted: Mapping[str, tuple[int, int]]) -> DatasetDict:
    """Rows of each split that is `wanted`: how many, or all where there are fewer, and by which seed; of others none.

    They are drawn from the next `BUFFER` rows, by the seed; of shards in a random order.
    """
    return DatasetDict(
        {name: _draw(rows, *wanted[name]) if name in wanted else Dataset.from_dict({}) for name, rows in splits.items()}
    )


def _draw(rows: IterableDataset, count: int, seed: int) -> Dataset:
    drawn = list(rows.shuffle(seed=seed, buffer_size=BUFFER).take(count))
    return Dataset.from_list(drawn, features=rows.features)
