"""How tests start makd as torchrun does: two processes on this machine's CPU, which talk by gloo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LIMIT = 240
"""Seconds that a start may take on a machine that is busy with other things."""


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(sys.path)}


def begin(*words):
    """Start `words` in two processes; gives what started them."""
    return subprocess.Popen(
        [*TORCHRUN, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def end(started):
    """Wait for the end: (exit code, stdout, stderr)."""
    try:
        out, err = started.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        started.send_signal(signal.SIGTERM)
        out, err = started.communicate(timeout=60)
        raise AssertionError(f"not done after {LIMIT} s\n{out}\n{err}") from None
    return started.returncode, out, err


def workers_of(started):
    """The numbers of both processes, the first one first."""
    listed = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text(encoding="utf-8").split()
    ranked = {}
    for number in map(int, listed):
        words = Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
        ranks = [int(word.partition(b"=")[2]) for word in words if word.startswith(b"RANK=")]
        if ranks:
            ranked[ranks[0]] = number
    return [ranked[rank] for rank in sorted(ranked)]


def wait_for(path, started):
    """Until there is something at `path`."""
    until = time.monotonic() + LIMIT
    while not path.exists():
        assert started.poll() is None, end(started)
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)
