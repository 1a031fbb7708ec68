"""Tables as they are printed into a file or a pipe, where no terminal says how wide they may be."""

import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from rich.console import Group
from rich.table import Table

from makd.cli import terminal
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


@pytest.mark.parametrize("inside", [lambda table: table, lambda table: Group(table, "a line below")])
def test_a_title_that_is_wider_than_its_table_is_one_line(capsys, inside):
    title = "/home/me/models/a-teacher-with-a-long-name [base] -> runs/teacher"
    table = Table("", "glue/mrpc", title=title)
    table.add_row("accuracy", "0.8")
    print_table(inside(table))
    assert capsys.readouterr().out.splitlines()[0].rstrip() == title
    assert table.title == title


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


def terminated_in(work: Callable[[], None]) -> bool:
    """Whether SIGTERM ends `work`."""
    try:
        with unwinding_at_sigterm():
            work()
    except Terminated:
        return True
    return False


def wait_for_sigterm() -> None:
    """Until it comes, or for twenty seconds."""
    for _ in range(2000):
        time.sleep(0.01)


class Deaf:
    """Its destructor is met by a signal, and Python ignores what is raised there."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_sigterm_comes_again_where_a_destructor_swallowed_it(capsys):
    def work() -> None:
        met = Deaf()
        del met
        wait_for_sigterm()

    hook = sys.unraisablehook
    assert terminated_in(work)
    assert sys.unraisablehook is hook
    assert not capsys.readouterr().err, "what comes again is no error to tell"


def test_sigterm_comes_again_where_a_library_catches_everything():
    def work() -> None:
        with suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        wait_for_sigterm()

    assert terminated_in(work)


def test_sigterm_does_not_come_again_while_what_is_temporary_is_removed(monkeypatch):
    monkeypatch.setattr(terminal, "_AGAIN", 0.01)
    removed = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            try:
                raise FileNotFoundError  # as a removal meets it
            except FileNotFoundError:
                time.sleep(0.2)
            time.sleep(0.2)
            removed.append(True)

    assert terminated_in(work)
    assert removed == [True]
