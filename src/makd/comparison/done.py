"""Station 10: which cells have a line already, of the settings that the experiment has now."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from makd.comparison.cells import Cell, cell_hashes, cell_name
from makd.comparison.results import read_lines
from makd.comparison.search import Found, known_settings
from makd.comparison.settings import Experiment

RESULTS_FILE = "results.jsonl"
"""In the output folder: a line for each cell."""


def done_lines(
    experiment: Experiment, cells: Sequence[Cell], known: Mapping[str, Found | None] | None = None
) -> dict[str, dict[str, Any]]:
    """The lines of those `cells` that were run with the experiment's present settings, by the cells' text.

    Of a method whose search is not over no line is known: its settings are open.

    Args:
        experiment: what is compared.
        cells: some of its cells.
        known: what the searches found, if that was read already.
    """
    known = known_settings(experiment, cells) if known is None else known
    # by name too: two rows may come to the same settings, as where a search ends at what another row fixes
    hashes = {
        str(cell): cell_hashes(experiment, cell, found) for cell in cells if (found := known[str(cell)]) is not None
    }
    lines = {}
    for line in read_lines(Path(experiment.output) / RESULTS_FILE):
        name = cell_name(line["cell"])
        if line["hash"] in hashes.get(name, ()):
            lines[name] = line
    return lines
