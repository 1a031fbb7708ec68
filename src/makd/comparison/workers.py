"""Station 10: who does the jobs of a comparison: this process, or several beside each other on one machine.

A GPU that waits for one small student's launches has room for many, and cores do more each for itself than together.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from makd.comparison.jobs import run_job
from makd.comparison.schedule import Job, Kind, Schedule
from makd.comparison.settings import Experiment
from makd.comparison.setup import Setups
from makd.errors import SettingError
from makd.progress import OnProgress, Progress, nobody

logger = logging.getLogger(__name__)

LOGS = "workers"
"""Folder of their logs, in the experiment's output."""

POLL = 1.0
"""Seconds after which a worker that has nothing to do looks again: a teacher that others wait for may be there."""


def run_here(experiment: Experiment, schedule: Schedule, progress: OnProgress) -> None:
    """Do all jobs in this process, one after the other."""
    setups = Setups(experiment, progress)
    try:
        while (job := schedule.take(setups.last)) is not None:
            line = _run_on(experiment, setups, progress, job)
            schedule.finish(job)
            _report(schedule, job, line, progress)
    finally:
        setups.close()


def run_in_processes(experiment: Experiment, schedule: Schedule, workers: int, progress: OnProgress) -> None:
    """Do the jobs in `workers` processes, which share the cores; each writes a log, `workers/NUMBER.log` in the output.

    If one fails, the jobs that the others are at are finished first; if this process is told to stop, they are not.

    Raises:
        MakdError: a job failed, with its error.
        SettingError: the system stopped a worker.
    """
    last: list[Path | None] = [None] * workers
    running: dict[Future[dict[str, Any] | None], tuple[int, Job]] = {}
    try:
        with _pools(experiment, workers) as pools:
            while True:
                for worker in set(range(workers)) - {worker for worker, _ in running.values()}:
                    job = schedule.take(last[worker])
                    if job is not None:
                        running[pools[worker].submit(_run_in_worker, job)] = worker, job
                if not running:
                    return
                for future in wait(running, POLL, FIRST_COMPLETED).done:
                    worker, job = running.pop(future)
                    line = future.result()
                    last[worker] = last[worker] if job.kind is Kind.TEACHER else job.setup
                    schedule.finish(job)
                    _report(schedule, job, line, progress)
    except BrokenProcessPool as error:
        raise SettingError(
            f"The system stopped a worker, most likely for want of memory. Lines that were written stay; go on with "
            f"fewer than {workers} --workers. Its last words are in {Path(experiment.output) / LOGS}."
        ) from error


@contextmanager
def _pools(experiment: Experiment, workers: int) -> Iterator[list[ProcessPoolExecutor]]:
    """A pool of one for each worker: one that has a setup gets the next job on it."""
    threads = max(1, torch.get_num_threads() // workers)
    context = get_context("spawn")  # a fork has no use of the parent's CUDA
    logs = Path(experiment.output) / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    others = set(active_children())
    pools = [
        ProcessPoolExecutor(1, context, initializer=_start, initargs=(experiment, logs / f"{number}.log", threads))
        for number in range(1, workers + 1)
    ]
    try:
        yield pools
    except (KeyboardInterrupt, SystemExit):
        for process in set(active_children()) - others:
            process.terminate()
        raise
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown()


def _report(schedule: Schedule, job: Job, line: dict[str, Any] | None, progress: OnProgress) -> None:
    done = schedule.cells - schedule.open_cells
    progress(Progress("cells", done, schedule.cells, "cells"))
    if line is not None:
        logger.info(
            "cell %d/%d: %s: score %.4f in %.0f s", done, schedule.cells, job.cell, line["score"],
            line["seconds"]["total"],
        )  # fmt: skip


def _run_on(experiment: Experiment, setups: Setups, progress: OnProgress, job: Job) -> dict[str, Any] | None:
    logger.info("%s: %s", job.kind.value, job.cell)
    return run_job(experiment, job, setups, progress)


# What follows runs in a worker.

_do: partial[dict[str, Any] | None] | None = None
"""`run_job` with this worker's experiment and setups."""

_setups: Setups | None = None
"""What this worker keeps on disk for its cells."""


def _start(experiment: Experiment, log: Path, threads: int) -> None:
    """All that a worker and its libraries print goes to its log; it ends when the process that started it is gone."""
    global _do, _setups
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: _end())
    torch.set_num_threads(threads)
    file = log.open("w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(file.fileno(), stream.fileno())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    _setups = Setups(experiment, nobody)
    _do = partial(_run_on, experiment, _setups, nobody)


def _end_with_parent() -> None:
    """Wait for that. A worker of a killed run would finish its cell beside those of the run that goes on."""
    parent = parent_process()
    assert parent is not None, "not in a worker"
    parent.join()
    _end()


def _end() -> None:
    try:
        if _setups is not None:
            _setups.close()  # teacher caches are gigabytes
    finally:
        os._exit(1)


def _run_in_worker(job: Job) -> dict[str, Any] | None:
    assert _do is not None, "a worker that was not started"
    return _do(job)
