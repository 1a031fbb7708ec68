"""Demos: real models that Python packages carry, text that Python itself carries, and the whole path between."""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from makd.cli.main import read_command
from makd.cli.outcome import Outcome
from makd.cli.runs import compress
from makd.errors import ModelLoadError
from makd.processes.started import check_alone
from makd.progress import OnProgress, reporting
from makd.registry import Registry
from makd.report import check_extra, write_report

RELOAD = """
import makd, sys, transformers
model = getattr(transformers, sys.argv[2]).from_pretrained(sys.argv[1])
print(makd.fingerprint(model.to(sys.argv[3])))
"""
"""What the new process runs: on the device of the run, since another one rounds in its own way."""


@dataclass(frozen=True)
class Demo:
    """A recipe that comes with makd."""

    recipe: str
    """File in `makd/recipes`, for `makd compress --config`."""
    output: str
    auto_class: str
    """transformers' class that loads the student."""

    @property
    def recipe_path(self) -> Path:
        """Where the recipe lies on this machine."""
        return Path(str(resources.files("makd") / "recipes" / self.recipe))


DEMOS: Registry[Demo] = Registry(
    "demo",
    {
        "minilm": Demo("minilm.yaml", "runs/demo", "AutoModel"),
        "smollm2": Demo("smollm2.yaml", "runs/demo-lm", "AutoModelForCausalLM"),
    },
)


def demo(on_progress: OnProgress, name: str, output: str | None = None) -> Outcome:
    """Compress a real model that a Python package carries, and load the student in a new process.

    Args:
        on_progress: called with a `Progress` after each unit of work.
        name: minilm (an encoder) or smollm2 (a decoder).
        output: folder for the student, replaced if it is there; without it runs/demo or runs/demo-lm.
    """
    check_alone("A demo", "Start it without torchrun or accelerate launch.")
    check_extra()
    chosen = DEMOS[name]
    folder = output or chosen.output
    words = ["--config", str(chosen.recipe_path), "--output", folder, "--overwrite"]
    made = compress(on_progress, **read_command("compress", words))
    with reporting("reload", on_progress):
        line = reload_in_new_process(folder, chosen.auto_class)
    with reporting("report", on_progress):
        page = write_report([folder])
    others = [one for one in made.next if not one.startswith("makd report ")]
    return replace(made, shown=[*made.shown, line, f"report: {page}"], next=others)


def reload_in_new_process(folder: str | Path, auto_class: str) -> str:
    """Load the student in `folder` in a new process and compare it with the one that was saved; a line that says so.

    Raises:
        ModelLoadError: it does not load, or is not the same bit for bit.
    """
    environment = json.loads((Path(folder) / "environment.json").read_text(encoding="utf-8"))
    command = [sys.executable, "-c", RELOAD, str(folder), auto_class, environment["device"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ModelLoadError(f"The student in {folder} does not load in a new process:\n{done.stderr[-2000:]}")
    expected = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))["fingerprint"]
    if done.stdout.split()[-1] != expected:
        raise ModelLoadError(f"The student in {folder} gives other outputs in a new process than before saving.")
    return f"reloaded in a new process with {auto_class}.from_pretrained({str(folder)!r}): the same, bit for bit"
