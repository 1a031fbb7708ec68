"""Station 9: both models in the formats that they may be served in, as the table that a person reads."""

from collections.abc import Sequence

from rich.table import Table

from makd.evaluation.formats import FormatRow
from makd.evaluation.verdict import quality, verdicts
from makd.run_folder.text_table import markdown_table, plain_table


def format_columns(rows: Sequence[FormatRow]) -> tuple[str, ...]:
    """Names of the columns: one of milliseconds for each batch and length, one of what was measured."""
    times = (f"{point.batch} x {point.length} ms" for point in rows[0].timings)
    return ("model", "format", "bytes", *(name for time in times for name in (time, "ratio")), _measure(rows))


def format_rows(rows: Sequence[FormatRow]) -> list[tuple[str, ...]]:
    """One text for each of `format_columns`."""
    return [
        (
            row.model,
            row.format,
            f"{row.bytes:,}",
            *(
                text
                for point in row.timings
                for text in (f"{point.timing.milliseconds:.1f}", f"{point.timing.ratio:.2f}x")
            ),
            f"{quality(row.scores).value:.4f}",
        )
        for row in rows
    ]


def formats_table(rows: Sequence[FormatRow], title: str) -> Table:
    """For the terminal."""
    return plain_table(title, format_columns(rows), format_rows(rows), left=2)


def formats_markdown(rows: Sequence[FormatRow]) -> str:
    """For a card: the table, and what follows from it."""
    table = markdown_table(format_columns(rows), format_rows(rows), left=2)
    return "\n\n".join([table, *verdicts(rows)])


def _measure(rows: Sequence[FormatRow]) -> str:
    return quality(rows[0].scores).name.replace("_", " ")
