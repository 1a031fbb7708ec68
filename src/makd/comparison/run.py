"""Station 10: the comparison: one cell after the other, a line for each, and on from where it was stopped."""

from pathlib import Path
from typing import Any

from makd.comparison.cells import all_cells, select
from makd.comparison.checks import check_cells
from makd.comparison.done import RESULTS_FILE, done_lines
from makd.comparison.latencies import measure_latencies
from makd.comparison.same_rows import warn_without_digests
from makd.comparison.schedule import Schedule
from makd.comparison.search import check_optuna
from makd.comparison.settings import Experiment
from makd.comparison.setup import paths_of
from makd.comparison.sources import check_sources
from makd.comparison.workers import run_here, run_in_processes
from makd.config import find_device
from makd.distill import warn_slow_bfloat16
from makd.errors import SettingError
from makd.kinds import takes
from makd.processes.started import check_alone
from makd.progress import OnProgress, nobody, reporting
from makd.random_state import keeping_random_state


@takes
@keeping_random_state()
def compare(
    experiment: Experiment,
    *,
    only: str | None = None,
    limit: int | None = None,
    workers: int = 1,
    on_progress: OnProgress | None = None,
) -> list[dict[str, Any]]:
    """Run those cells of `experiment` that are not in its output folder yet.

    Args:
        experiment: what is compared.
        only: cells to keep to, such as `task=mrpc,method=makd,seed=1`.
        limit: at most so many cells are run now.
        workers: processes that run cells beside each other, on the same device; what comes of a cell is the same for
            any number of them that leaves a process as many threads.
        on_progress: called with a `Progress` after each unit of work, for progress bars.

    Returns:
        The lines of the cells that `only` names, those that were there before included.

    Raises:
        OutputError: teacher or text are not what they were when the folder's first cells were run.
        MakdError: with what was wrong, which value, and what is allowed; what can be known of any cell without its
            teacher, before anything is run. Lines that were written stay.
    """
    check_alone(
        "A comparison", "Start it without torchrun or accelerate launch; `workers` runs cells beside each other."
    )
    if workers < 1:
        raise SettingError(f"workers is at least 1 process; got {workers}.")
    progress = on_progress or nobody
    chosen = select(all_cells(experiment), only)
    lines = done_lines(experiment, chosen)
    waiting = [cell for cell in chosen if str(cell) not in lines][:limit]
    if waiting and experiment.search.trials:
        check_optuna()
    if waiting and "bfloat16" in (experiment.training.precision, experiment.finetune.training.precision):
        warn_slow_bfloat16(find_device(experiment.device))
    if waiting:
        with reporting("check", progress):
            check_cells(experiment, waiting)
    check_sources(Path(experiment.output), [experiment.teacher, experiment.tokenizer], paths_of(experiment))
    if waiting:
        warn_without_digests(lines.values(), Path(experiment.output) / RESULTS_FILE)
    schedule = Schedule(experiment, waiting)
    if workers > 1 and schedule.open_cells:
        run_in_processes(experiment, schedule, workers, progress)
    else:
        run_here(experiment, schedule, progress)
    lines |= done_lines(experiment, waiting)
    done = [cell for cell in chosen if str(cell) in lines]
    if experiment.latency:
        measure_latencies(experiment, done, progress)
    return [lines[str(cell)] for cell in done]
