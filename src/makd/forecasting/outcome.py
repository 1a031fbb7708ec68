"""Before the flow: what was forecast of a run, and the table that a person reads."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rich.console import Console, ConsoleOptions, Group
from rich.table import Table
from rich.text import Text

from makd.anatomy import Anatomy
from makd.factorization.room import Available, Room
from makd.forecasting.fit import check_fits, gigabytes, parts_of
from makd.forecasting.student import Forecast
from makd.forecasting.training import TrainingForecast

Command = Literal["compress", "factorize"]


@dataclass(frozen=True)
class RunForecast:
    """What a run will make, and take. Printed by rich, it is a table."""

    teacher: str
    command: Command
    anatomy: Anatomy
    """Of the teacher."""
    student: Forecast
    """How the student is made."""
    training: TrainingForecast | None
    """None for a run without any."""
    available: Available
    """What this machine has."""
    seconds: Mapping[str, float]
    """Stage -> about how long it takes on this machine: `factorize`, and with training `distill`. Measuring the student
    comes besides."""

    def check(self) -> None:
        """Refuse what cannot be done here.

        Raises:
            RoomError: more memory or disk is needed than there is.
        """
        check_fits(self.student, self.available, [] if self.training is None else [self.training.memory])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Group]:
        """The table, and lines about it."""
        yield forecast_table(self)

    def __str__(self) -> str:
        """The forecast's table as plain text."""
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(forecast_table(self))
        return capture.get()


def forecast_table(forecast: RunForecast) -> Group:
    """What a run will make and take, for the terminal."""
    made = forecast.student
    table = Table()
    for column in ("", "teacher", "student, at most"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for label, theirs, ours in (
        ("parameters", made.teacher_parameters, made.student_parameters),
        ("  of the linears", made.teacher_linears, made.student_linears),
    ):
        table.add_row(label, f"{theirs:,}", f"{ours:,} ({ours / theirs:.1%})")
    ranks = Table()
    for column in ("role", "out x in", "linears", "ranks"):
        ranks.add_column(column, justify="left" if column == "role" else "right", no_wrap=True)
    for row in _rank_rows(made, forecast.anatomy):
        ranks.add_row(*row)
    needs = Table()
    for column in ("", "needed", "there is", "free now"):
        needs.add_column(column, justify="right" if column else "left", no_wrap=True)
    for line in _needs(forecast):
        needs.add_row(*line)
    return Group(
        Text(f"{forecast.teacher}: what would be made", "bold"),
        table,
        Text("its ranks" if made.are_ranks_known else "its ranks, if they were uniform", "bold"),
        ranks,
        Text("what it takes, about", "bold"),
        needs,
        Text("\n".join(_lines(forecast))),
    )


def _rank_rows(made: Forecast, anatomy: Anatomy) -> list[tuple[str, str, str, str]]:
    """(roles, shape, how many, smallest..largest rank), one for linears of the same roles and shape."""
    roles: dict[str, dict[str, None]] = defaultdict(dict)
    for layer in anatomy.layers:
        for role, linear in layer.roles.items():
            roles[linear.module][role.value] = None
    alike: dict[tuple[str, str], list[int | None]] = defaultdict(list)
    for name, rank in made.ranks.items():
        size = made.sizes[name]
        alike[", ".join(roles[name] or [name]), f"{size.out_features} x {size.in_features}"].append(rank)
    return [(label, shape, str(len(found)), _range(found)) for (label, shape), found in alike.items()]


def _range(ranks: list[int | None]) -> str:
    numbers = [rank for rank in ranks if rank is not None]
    dense = len(ranks) - len(numbers)
    if not numbers:
        return "dense"
    low, high = min(numbers), max(numbers)
    told = str(low) if low == high else f"{low}..{high}"
    return told if not dense else f"{told}, {dense} dense"


def _needs(forecast: RunForecast) -> list[tuple[str, str, str, str]]:
    made, there, rows = forecast.student, forecast.available, []
    memory, least = there.memory if there.device is None else there.device, "over " if made.is_least else ""
    rows.append((f"memory, to factorize ({made.memory.when})", least + gigabytes(made.memory.total), *_room(memory)))
    if forecast.training is not None:
        trained = forecast.training.memory
        when = "" if trained.when == "training" else f" ({trained.when})"
        rows.append((f"memory, to train{when}", gigabytes(trained.total), *_room(memory)))
    rows.append(("disk", gigabytes(made.disk), *_room(there.disk)))
    for stage, seconds in forecast.seconds.items():
        told = least if stage == "factorize" else ""
        rows.append((f"time, {stage}", told + _duration(seconds), "", ""))
    return rows


def _room(room: Room) -> tuple[str, str]:
    return _size(room.size), _size(room.free)


def _size(size: int | None) -> str:
    return "" if size is None else gigabytes(size)


def _lines(forecast: RunForecast) -> list[str]:
    made = forecast.student
    lines = [f"solver {made.solver}, ranks {made.rank_rule}"]
    if made.text.batches:
        rows = sum(rows for rows, _ in made.text.batches)
        lines.append(f"calibration: {rows:,} rows, {made.text.tokens:,} tokens with their padding")
    lines.append(f"memory: {parts_of(made.memory)}; Python and its libraries besides")
    if made.store_bytes:
        where = "in memory" if made.store == "memory" else "on disk, until it is done"
        lines.append(f"hidden states, and what is kept of each layer: {gigabytes(made.store_bytes)} {where}")
    if forecast.training is not None:
        lines.append(f"training: {forecast.training.steps:,} steps, {forecast.training.tokens:,} tokens with padding")
    lines.append("time: by kernels that were timed just now, for a machine that does nothing else; measuring besides")
    return [*lines, *(f"note: {note}" for note in made.notes)]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
