"""The command `makd report`: runs as one HTML file. Needs no torch."""

from makd.cli.outcome import Outcome
from makd.progress import OnProgress, reporting
from makd.report import write_report


def report(on_progress: OnProgress, runs: list[str], output: str | None = None, overwrite: bool = False) -> Outcome:
    """Write what runs left in their folders as one HTML file, which needs no network.

    Args:
        on_progress: called with a `Progress` after each unit of work.
        runs: folders of students; several are shown beside each other.
        output: the file; without it report.html in the folder of the only run.
        overwrite: replace a report that is there.
    """
    with reporting("report", on_progress):
        page = write_report(runs, output, overwrite=overwrite)
    return Outcome({"report": page}, [f"report: {page}"])
