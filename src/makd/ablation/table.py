"""Station 10: the lines of an ablation as a table: what each variation measures, and how it differs."""

from collections.abc import Sequence

from rich.table import Table

from makd.ablation.measured import Line, by_variation, mean_text, measures_of, seconds_of
from makd.ablation.variations import WHOLE
from makd.run_folder.text_table import TextTable, plain_table

START = "start, untaught"


def ablation_table(lines: Sequence[Line]) -> TextTable:
    """For a page: the teacher, the start, and each variation."""
    measures, variations = measures_of(lines[0]["metrics"]), by_variation(lines)
    first = measures[0]
    rows = [
        (name, *(measure.text(measure.mean(lines, when)) for measure in measures), "", "")
        for name, when in (("teacher", "teacher"), (START, "before"))
        if any(measure.mean(lines, when) for measure in measures)
    ]
    for name, own in variations.items():
        less = "" if name == WHOLE else first.gain_text(first.gain(own, variations[WHOLE]))
        told = (measure.text(measure.mean(own, "after")) for measure in measures)
        rows.append((name, *told, mean_text(seconds_of(own), "{:.0f}"), less))
    decides = f"{first.label} minus that of the {WHOLE}, {first.towards} is better"
    return TextTable(["", *(measure.label for measure in measures), "seconds", decides], rows)


def shown_table(lines: Sequence[Line], title: str) -> Table:
    """For the terminal."""
    table = ablation_table(lines)
    return plain_table(title, table.columns, [tuple(row) for row in table.rows], table.left)
