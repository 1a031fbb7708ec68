"""One tool's training loop in a process of its own, which takes one step whenever the benchmark says so.

    python -m distilling.worker '{"tool": "makd", "plan": "full", ...}'

The loop is the tool's; a hook on the optimizer's step marks where one step ends and waits there for the next turn.
A turn is a line on stdin: `step`, `memory` (the same, with the peak of memory measured) or `stop`. The answer is a line
of JSON on what was stdout; all that a tool prints goes to stderr.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


class Turns:
    """Where steps begin and end, and what is measured of them."""

    def __init__(self, channel: TextIO, device: str) -> None:
        self.channel = channel
        self.is_cuda = device == "cuda"
        self.loss: Tensor | None = None
        """Of the last step, as the tool minimises it."""
        self._turn = ""
        self._begun: Any = None
        self._before = resident("VmRSS")

    def start(self) -> None:
        """Call when everything but the training loop is ready."""
        register_optimizer_step_post_hook(lambda *_: self._end())
        self.say({"ready": True})
        self._wait()

    def note(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """A loss function that also leaves its value here."""

        def noting(*arguments: Any, **named: Any) -> Any:
            value = loss(*arguments, **named)
            self.loss = (value[0] if isinstance(value, tuple) else value).detach()
            return value

        return noting

    def _wait(self) -> None:
        self._turn = sys.stdin.readline().strip()
        if self._turn in ("", "stop"):
            self.channel.flush()
            os._exit(0)  # tools save, log and clean up otherwise
        if self._turn == "memory":
            if self.is_cuda:
                torch.cuda.reset_peak_memory_stats()
            else:
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here
        if self.is_cuda:
            torch.cuda.synchronize()
            self._begun = torch.cuda.Event(enable_timing=True)
            self._begun.record()
        else:
            self._begun = time.perf_counter()

    def _end(self) -> None:
        if self.is_cuda:
            ended = torch.cuda.Event(enable_timing=True)
            ended.record()
            torch.cuda.synchronize()
            seconds = self._begun.elapsed_time(ended) / 1000
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            seconds = time.perf_counter() - self._begun
            peak = resident("VmHWM") - self._before
        answer = {"seconds": seconds, "loss": None if self.loss is None else float(self.loss)}
        self.say(answer | ({"peak_mb": peak} if self._turn == "memory" else {}))
        self._wait()

    def say(self, answer: dict[str, Any]) -> None:
        self.channel.write(json.dumps(answer) + "\n")
        self.channel.flush()


def resident(name: str) -> float:
    """A line of this process's status, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def _name_torchvisions_operators() -> None:
    """Let torchvision be imported where its build is for another torch and finds no operators.

    torchdistill imports it, and transformers where Pillow is there too. No operator of it is called: names are enough.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in ("nms", "qnms"):
            _TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


def main() -> NoReturn:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    cell = json.loads(sys.argv[1])
    torch.set_num_threads(cell["threads"])
    torch.manual_seed(cell["seed"])
    _name_torchvisions_operators()
    from distilling.tools import TOOLS

    prepare = TOOLS[cell["tool"]](cell)  # imports: what a library takes by itself is not the step's memory
    turns = Turns(channel, cell["device"])
    prepare(turns)
    raise RuntimeError("the tool's loop ended before the benchmark did")


if __name__ == "__main__":
    main()
