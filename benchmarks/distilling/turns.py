"""Several tools' loops side by side: a process each, and one step at a time, in turn."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1]
SOURCE = BENCHMARKS.parent / "src"


class Worker:
    """A cell's process."""

    def __init__(self, cell: dict[str, Any], python: str) -> None:
        self.cell = cell
        self.answers: list[dict[str, Any]] = []
        self.error: str | None = None
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed by stop
        places = [str(SOURCE), str(BENCHMARKS)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": str(cell["threads"]), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [python, "-m", "distilling.worker", json.dumps(cell)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip

    def begin(self) -> None:
        """Wait until it stands before its first step."""
        self._hear()

    def turn(self, what: str) -> None:
        """One step; its answer is the last of `answers`. Nothing happens where the tool has failed."""
        if self.error is None:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(what + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                pass
            answer = self._hear()
            if answer is not None:
                self.answers.append(answer)

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def _hear(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        self._log.seek(0)
        said = [text for text in self._log.read().splitlines() if text.strip()]
        self.error = said[-1].strip() if said else f"ended with {self._process.wait()}"
        return None


def take_turns(
    cells: Sequence[dict[str, Any]], pythons: Sequence[str], warmup: int, repeats: int
) -> list[dict[str, Any]]:
    """Steps of all cells, in turn; the first is what the others are divided by, step by step.

    Returns:
        Of each cell: its median seconds, the median of its ratios, its peak of memory (of a step that is not timed),
        the loss of its first step; or the error that ended it.
    """
    workers = [Worker(cell, python) for cell, python in zip(cells, pythons, strict=True)]
    try:
        for worker in workers:
            worker.begin()
        for what in ["step"] * (warmup + repeats) + ["memory"]:
            for worker in workers:
                worker.turn(what)
        return [_sum_up(worker, workers[0], warmup) for worker in workers]
    finally:
        for worker in workers:
            worker.stop()


def _sum_up(worker: Worker, anchor: Worker, warmup: int) -> dict[str, Any]:
    if worker.error is not None:
        print(f"{worker.cell['tool']} {worker.cell['plan']}: {worker.error}", file=sys.stderr)
        return {"error": worker.error}
    own, other = ([answer["seconds"] for answer in side.answers[warmup:-1]] for side in (worker, anchor))
    peak = worker.answers[-1]["peak_mb"]
    found = {
        "seconds": statistics.median(own),
        "all_seconds": [round(value, 4) for value in own],
        "peak_mb": round(peak, 1),
        "first_loss": worker.answers[0]["loss"],
    }
    if anchor.error is None:
        found["time_ratio"] = round(statistics.median(a / b for a, b in zip(own, other, strict=True)), 3)
        found["memory_ratio"] = round(peak / anchor.answers[-1]["peak_mb"], 3)
    return found
