"""Station 9: one table of texts, for the terminal and for a card."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclass(frozen=True)
class TextTable:
    """A table of texts, and what a reader has to know of it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: int = 1
    """Columns that are texts; the others are numbers."""

    @property
    def markdown(self) -> str:
        """For a page."""
        table = markdown_table(self.columns, self.rows, self.left)
        return f"{table}\n\n{self.note}" if self.note else table


def plain_table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], left: int) -> Table:
    """For the terminal; the first `left` columns are texts, the others numbers."""
    table = Table(title=title, title_style="bold", title_justify="left", box=SIMPLE_HEAD)  # 80 columns are enough
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """For a card or a page; the first `left` columns are texts, the others numbers."""
    rule = ["---" if index < left else "---:" for index in range(len(columns))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))
