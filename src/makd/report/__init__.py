"""A run, or a comparison, as one HTML file that a person looks at: no network, no torch.

a run's folder -> `record` -> sections of `elements` and `charts` -> `page`
"""

from collections.abc import Sequence
from pathlib import Path

from makd.errors import OutputError, SettingError
from makd.report.advice import advice
from makd.report.curves import layers, spectra, training
from makd.report.elements import Markup, element
from makd.report.glance import glance
from makd.report.page import check_extra, listed, short_name_of, whole_page
from makd.report.record import ADVICE, Record, read_run
from makd.report.runs import frontier, names_of
from makd.report.sections import linear_map, name_of_run, quality, recipe, samples, warnings
from makd.report.target import check_target, write_target
from makd.run_files import PAGE
from makd.shell import command

__all__ = ["check_extra", "check_target", "write_report"]


def write_report(runs: Sequence[str | Path], output: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Write what runs left in their folders as one HTML file.

    Args:
        runs: folders of students.
        output: the file; None is `report.html` in the folder of the only run.
        overwrite: whether a report that is there may be replaced. Another file never is.

    Returns:
        Where it is.

    Raises:
        OutputError: a folder is no student that makd measured, a file in it is damaged, or the report cannot be
            written.
        SettingError: there is no run, several and no `output`, or the charts' library is not installed.
    """
    if not runs:
        raise SettingError("A report is of one run or several: give their folders.")
    if output is None and len(runs) > 1:
        raise SettingError("A report of several runs needs a place of its own: name it with --output FILE.html.")
    check_extra()
    prefixes = [""] if len(runs) == 1 else [f"run-{number}-" for number in range(1, len(runs) + 1)]
    records = [read_run(folder, prefix) for folder, prefix in zip(runs, prefixes, strict=True)]
    path = Path(output).expanduser() if output is not None else records[0].folder / PAGE
    check_target(path, overwrite)
    write_target(path, _one(records[0]) if len(records) == 1 else _several(records))
    return path


def _parts(record: Record) -> list[tuple[str, str, Markup]]:
    """The sections of one run, in the order in which a person asks."""
    try:
        return [
            ("glance", "At a glance", glance(record, advice(record))),
            ("quality", "Quality", quality(record)),
            ("map", "Map", linear_map(record)),
            ("spectra", "Spectra", spectra(record)),
            ("layers", "Layers", layers(record)),
            ("training", "Training", training(record)),
            ("samples", "Samples", samples(record)),
            ("warnings", "Warnings", warnings(record)),
            ("recipe", "Recipe", recipe(record)),
        ]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        told = f"{type(error).__name__}: {error}"
        raise OutputError(f"A file of {record.folder} is not as makd writes it ({told}). {ADVICE}") from error


def _one(record: Record) -> str:
    title = f"{record.name}: a smaller {short_name_of(record.teacher)}"
    return whole_page(title, name_of_run(record), _parts(record), command("report", record.folder))


def _several(records: Sequence[Record]) -> str:
    parts = [("frontier", "Beside each other", frontier(records))]
    for number, (name, record) in enumerate(zip(names_of(records), records, strict=True), start=1):
        folded = element("details", element("summary", name), listed(_parts(record)), class_="run", id=f"run-{number}")
        parts.append((f"run-{number}", name, folded))
    folders = [record.folder for record in records]
    return whole_page(f"{len(records)} students", element("span", "made by makd"), parts, command("report", *folders))
