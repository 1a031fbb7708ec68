"""Station 9: a run's measurements as the table that a person reads."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from makd.measures import table_of, task_label
from makd.run_folder.text_table import markdown_table


def scores_table(task: Mapping[str, Any], title: str) -> Table:
    """The metrics of a model on a task, for the terminal."""
    table = Table(title=title, title_style="bold", title_justify="left")
    table.add_column("")
    table.add_column(task["name"], justify="right")
    for name, value in task["after"].items():
        table.add_row(task_label(name), f"{value:.4f}")
    return table


def metrics_table(metrics: Mapping[str, Any], title: str) -> Table:
    """The measurements of a run, for the terminal."""
    table = Table(title=title, title_style="bold", title_justify="left")
    head, rows = table_of(metrics, ["", "teacher", "before training", "student"])
    for column in head:
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def metrics_markdown(metrics: Mapping[str, Any]) -> str:
    """The measurements of a run as a table of a model card."""
    return markdown_table(*table_of(metrics, ["", "teacher", "student before training", "student"])) + "\n"
