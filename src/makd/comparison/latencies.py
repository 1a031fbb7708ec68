"""Station 10: how fast the students are: each method and budget timed once, while nothing else of a comparison runs.

A line says on which machine. Students may be taught on one machine and timed on another: the one that they are for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from makd.comparison.cells import Cell, latency_hash
from makd.comparison.results import append_line, read_lines
from makd.comparison.settings import Experiment
from makd.comparison.setup import Setups
from makd.comparison.teach import prepare_student
from makd.config import find_device
from makd.evaluation import latency
from makd.progress import OnProgress, Progress
from makd.run_folder import describe_environment

LATENCY_FILE = "latency.jsonl"
"""In the output folder: a line for each method and budget."""

BATCHES = {1: 15, 16: 5}
"""Rows of a timed forward, and how often it is repeated."""


def known_latencies(experiment: Experiment, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """The lines of the methods and budgets of `cells`, by their hash, that were timed on such a device as it has.

    Of several machines those of the last one: milliseconds of two have no place in one column.
    """
    lines = _lines(experiment, cells)
    return _of_machine(lines, _machine(lines[-1]["environment"])) if lines else {}


def _lines(experiment: Experiment, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    wanted = {latency_hash(experiment, cell) for cell in cells}
    device = find_device(experiment.device).type
    lines = read_lines(Path(experiment.output) / LATENCY_FILE)
    return [line for line in lines if line["hash"] in wanted and line["environment"]["device"].startswith(device)]


def _of_machine(lines: Sequence[dict[str, Any]], machine: object) -> dict[str, dict[str, Any]]:
    return {line["hash"]: line for line in lines if _machine(line["environment"]) == machine}


def _machine(environment: Mapping[str, Any]) -> object:
    return environment["device_name"], environment["threads"]


def measure_latencies(experiment: Experiment, cells: Sequence[Cell], progress: OnProgress) -> None:
    """Time the teacher and the student of every method and budget of `cells` that has no line of this machine yet.

    The student is that of the first such cell, before it is taught: its shape is what counts. Rows that differ in what
    they learn alone share a line.
    """
    here = _machine(describe_environment(find_device(experiment.device), 0))
    known = _of_machine(_lines(experiment, cells), here)
    missing: dict[str, Cell] = {}
    for cell in cells:
        missing.setdefault(latency_hash(experiment, cell), cell)
    missing = {identity: cell for identity, cell in missing.items() if identity not in known}
    setups = Setups(experiment, progress)
    try:
        for number, (identity, cell) in enumerate(missing.items(), start=1):
            setup = setups.of(cell.task, cell.seed)
            made = prepare_student(setup, cell.method.build(), cell.budget, cell.seed, progress)
            pair = {"teacher": setup.teacher, "student": made.student.eval()}
            timed = {
                f"batch{rows}": latency(pair, rows, experiment.latency_tokens, repeats)
                for rows, repeats in BATCHES.items()
            }
            line = {
                "method": cell.method.name, "budget": cell.names["budget"], "latency_ms": timed, "hash": identity,
                "environment": describe_environment(setup.teacher.device, cell.seed),
            }  # fmt: skip
            append_line(Path(experiment.output) / LATENCY_FILE, line)
            progress(Progress("latency", number, len(missing), "cells"))
    finally:
        setups.close()
