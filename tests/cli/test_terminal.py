"""Tables as they are printed into a file or a pipe, where no terminal says how wide they may be."""

from rich.console import Group
from rich.table import Table

from makd.cli.terminal import print_table


def wide_table() -> Table:
    table = Table("", "teacher", "before training", "student", title="a title")
    table.add_row("glue/stsb Spearman correlation", "22,713,601", "17,394,433 (76.6%)", "17,394,433 (76.6%)")
    return table


def test_no_number_of_a_table_is_cut_short_where_there_is_no_terminal(capsys):
    print_table(wide_table())
    row = next(line for line in capsys.readouterr().out.splitlines() if "glue" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["glue/stsb Spearman correlation", "22,713,601", "17,394,433 (76.6%)", "17,394,433 (76.6%)"]


def test_a_table_is_not_made_wider_than_it_needs(capsys):
    print_table(Group(wide_table(), "a line below"))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) < 100
    assert lines[-1] == "a line below"
