"""The command `makd report`: runs as one HTML file. Needs no torch."""

from makd.html_report import write_report


def report(runs: list[str], output: str | None = None, overwrite: bool = False) -> None:
    """Write what runs left in their folders as one HTML file, which needs no network.

    Args:
        runs: folders of students; several are shown beside each other.
        output: the file; without it report.html in the folder of the only run.
        overwrite: replace a report that is there.
    """
    print(f"report: {write_report(runs, output, overwrite=overwrite)}")
