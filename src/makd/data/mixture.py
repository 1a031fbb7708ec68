"""Station 2, continued: several sources as one, in exact shares."""

import logging
import math
from collections.abc import Sequence
from fractions import Fraction

from datasets import Dataset, Features, Value, concatenate_datasets

from makd.errors import DataError

logger = logging.getLogger(__name__)


def mix(
    sources: Sequence[Dataset], weights: Sequence[float], names: Sequence[str], limit: int | None, seed: int
) -> tuple[Dataset, tuple[int, ...]]:
    """Rows of all sources, of each as its weight says: as many as there are without one that comes twice.

    They stand one source after the other; how many are of each is given besides. Which rows of a source are taken
    depends on the seed. Shares are exact to one row.

    Args:
        sources: rows of one kind: texts, or conversations.
        weights: of each, above 0.
        names: what the user calls them.
        limit: at most so many rows together; None takes as many as the weights allow.
        seed: of the choice.

    Raises:
        DataError: they are of different kinds, or a source would have no row.
    """
    _check_kinds(sources, names)
    total = sum(map(Fraction, weights))
    shares = [Fraction(weight) / total for weight in weights]
    most = min(math.floor(len(rows) / share) for rows, share in zip(sources, shares, strict=True))
    count = most if limit is None else min(limit, most)
    counts = apportion(count, shares)
    if not all(counts):
        empty = names[counts.index(0)]
        raise DataError(f"Of a mixture of {count} rows {empty} would have none. Raise its weight, or data.rows.")
    logger.info(
        "A mixture of %s rows: %s",
        f"{count:,}",
        ", ".join(
            f"{taken:,} of {len(rows):,} of {name} ({taken / count:.1%})"
            for taken, rows, name in zip(counts, sources, names, strict=True)
        ),
    )
    parts = [
        _same_strings(rows.shuffle(seed=seed).select(range(taken))) for rows, taken in zip(sources, counts, strict=True)
    ]
    return concatenate_datasets(parts), tuple(counts)


def apportion(count: int, shares: Sequence[Fraction]) -> list[int]:
    """`count` in whole parts of these shares, which add up to 1: what is left over goes to the largest remainders."""
    exact = [share * count for share in shares]
    parts = [math.floor(one) for one in exact]
    order = sorted(range(len(parts)), key=lambda place: parts[place] - exact[place])
    for place in order[: count - sum(parts)]:
        parts[place] += 1
    return parts


def _check_kinds(sources: Sequence[Dataset], names: Sequence[str]) -> None:
    first = sorted(sources[0].column_names)
    for rows, name in zip(sources, names, strict=True):
        if sorted(rows.column_names) != first:
            raise DataError(
                f"A mixture is of one kind of rows: {names[0]} gives {', '.join(first)}, {name} gives "
                f"{', '.join(sorted(rows.column_names))}. Mix texts with texts, or conversations with conversations."
            )


def _same_strings(rows: Dataset) -> Dataset:
    """Texts in one of Arrow's forms of strings, so that they can be joined."""
    plain = {name: Value("string") if name.startswith("text") else feature for name, feature in rows.features.items()}
    return rows.cast(Features(plain)) if plain != dict(rows.features) else rows
