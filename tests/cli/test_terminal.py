"""Tables as they are printed into a file or a pipe, where no terminal says how wide they may be."""

import signal

import pytest
from rich.console import Group
from rich.table import Table

from makd.cli.main import main
from makd.cli.terminal import Terminated, print_table, unwinding_at_sigterm


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


def test_sigterm_does_after_a_command_what_it_did_before():
    def mine(*_: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with unwinding_at_sigterm():
            assert signal.getsignal(signal.SIGTERM) is not mine
            with pytest.raises(Terminated):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is mine
        assert main(["inspect", "./nowhere"]) == 2
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
