"""The command `makd ablate`: a run's file, and the run again with one aspect off at a time."""

from pathlib import Path

from makd.ablation import TABLE, shown_table, write_ablation_report
from makd.ablation import ablate as run_ablation
from makd.cli.main import read_command
from makd.cli.outcome import Outcome
from makd.progress import OnProgress
from makd.report import check_extra, check_target
from makd.shell import command


def ablate(
    on_progress: OnProgress,
    run: str,
    output: str = "runs/ablation",
    seeds: tuple[int, ...] = (1, 2, 3),
    report: str | None = None,
) -> Outcome:
    """Make a run again without each aspect of its plan, and tell what each brings.

    Args:
        on_progress: called with a `Progress` after each unit of work.
        run: YAML file of a run, as `makd compress --config` takes it; or a student's recipe.yaml.
        output: folder of the results and their table; what is done there is not done again.
        seeds: each is a start, and a student of each variation.
        report: also write what was found to this file, as an HTML page that needs no network.
    """
    if report is not None:
        check_extra()
        check_target(Path(report).expanduser(), overwrite=True)
    asked = read_command("compress", ["--config", run, "--output", output])
    data = asked["data"] if asked["task"] is None else asked["task"]
    found = run_ablation(
        asked["teacher"], data, asked["budget"], asked["recipe"], output,
        seeds=seeds, tokenizer=asked["tokenizer"], on_progress=on_progress,
    )  # fmt: skip
    title = f"{run}: what each aspect brings, {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}"
    shown = [shown_table(found.lines, title), f"written: {found.folder / TABLE}"]
    pages = [] if report is None else [write_ablation_report(found, report, run)]
    shown += [f"report: {page}" for page in pages]
    as_page = command("ablate", run, output=output, seeds=list(seeds), report=f"{Path(run).stem}-ablation.html")
    told = {"folder": found.folder, "lines": found.lines, "report": next(iter(pages), None)}
    return Outcome(told, shown, [] if pages else [f"{as_page}   # the same to look at"])
