"""Station 10: what is known of an experiment so far, as its pages tell it: lines, an introduction, tables."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from makd.comparison.cells import Cell, all_cells, latency_hash
from makd.comparison.done import done_lines
from makd.comparison.language_tables import LANGUAGE_SCORE, language_tables
from makd.comparison.latencies import known_latencies
from makd.comparison.same_rows import check_alike
from makd.comparison.settings import Experiment, budget_name, short_name
from makd.comparison.tables import Lines, cost_table, lead_table, quality_table
from makd.errors import OutputError
from makd.measures import TASK_LABELS
from makd.ranks.budget import Budget
from makd.run_folder.text_table import TextTable
from makd.tasks.metrics import scored


@dataclass(frozen=True)
class ComparisonResults:
    """The cells that were run, and the latencies that were measured."""

    cells: tuple[Cell, ...]
    """All, run or not."""
    lines: Lines
    timed: Mapping[str, Mapping[str, Any]]
    """Lines of latencies, by their hash."""

    def lines_of(self, budget: Budget) -> Lines:
        """Those of one budget."""
        return [line for line in self.lines if line["cell"]["budget"] == budget_name(budget)]

    def timed_of(self, experiment: Experiment, budget: Budget) -> dict[str, Mapping[str, Any]]:
        """Method -> its line of latencies at one budget."""
        own = {cell.method.name: latency_hash(experiment, cell) for cell in self.cells if cell.budget == budget}
        return {name: self.timed[identity] for name, identity in own.items() if identity in self.timed}


def read_results(experiment: Experiment, name: str) -> ComparisonResults:
    """Read what is known.

    Args:
        experiment: its output folder has the results.
        name: of the experiment's file.

    Raises:
        OutputError: no cell was run with these settings, or cells of a task were measured on different rows.
    """
    cells = all_cells(experiment)
    lines = list(done_lines(experiment, cells).values())
    if not lines:
        raise OutputError(
            f"{experiment.output} has no cell with these settings yet. Run `makd compare {shlex.quote(name)}` first."
        )
    check_alike(lines)
    return ComparisonResults(tuple(cells), lines, known_latencies(experiment, cells))


def budget_tables(experiment: Experiment, results: ComparisonResults) -> Iterator[tuple[str, list[TextTable]]]:
    """Every budget that has lines, by its name, and its tables."""
    for budget in experiment.budgets:
        own = results.lines_of(budget)
        if own:
            lead = lead_table(experiment, own)
            costs = cost_table(experiment, own, results.timed_of(experiment, budget))
            tables = [quality_table(experiment, own), *language_tables(experiment, own)]
            yield budget_name(budget), [*tables, *([] if lead is None else [lead]), costs]


def introduction(experiment: Experiment, results: ComparisonResults) -> str:
    """What was compared, where it was taught, and where timed."""
    labels = {
        short_name(task): " and ".join(
            TASK_LABELS.get(metric, metric) for metric in scored(task.known.kind, task.measured)
        )
        for task in experiment.tasks
    }
    labels |= {language.name: LANGUAGE_SCORE for language in experiment.language}
    told = "; ".join(f"{task}: {metrics}" for task, metrics in labels.items())
    machines = "; ".join(dict.fromkeys(_machine(line["environment"]) for line in results.lines))
    latencies = "; ".join(dict.fromkeys(_machine(line["environment"]) for line in results.timed.values()))
    return (
        f"{len(results.lines)} of {len(results.cells)} cells. Score of a task is the mean of its metrics ({told}).\n"
        f"Seeds {', '.join(map(str, experiment.seeds))}; all methods have the same teacher, rows, batches and steps.\n"
        f"\nTaught on: {machines}.\n" + (f"\nLatencies are of: {latencies}.\n" if latencies else "")
    )


def _machine(environment: Mapping[str, Any]) -> str:
    versions = environment["versions"]
    told = ", ".join(f"{package} {versions[package]}" for package in ("torch", "transformers", "makd"))
    return f"{environment['device_name']}, threads: {environment['threads']}, {told}"
