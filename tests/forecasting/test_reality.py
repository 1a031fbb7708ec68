"""Forecasts beside what a run then takes, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "forecast.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [["--hidden=512", "--layers=4", "--rows=64", "--solver=whitened", "--files"], ["--hidden=256", "--layers=2"]],
    ids=["from files", "in memory"],
)
def test_time_is_within_a_factor_of_two_and_memory_from_files_too(run):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--here", *run], stdout=subprocess.PIPE, text=True, check=True, timeout=600
    )
    line = json.loads(done.stdout.splitlines()[-1])
    found, told = line["measured"], line["forecast"]
    assert told["seconds"] / 2 < found["seconds"] < 2 * told["seconds"] + 1
    if "--files" in run:  # in memory, what models and libraries keep between steps comes besides
        assert told["bytes"] / 2 < found["bytes"] < 2 * told["bytes"]
