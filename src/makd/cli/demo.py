"""Demos: real models that Python packages carry, text that Python itself carries, and the whole path between."""

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from makd.errors import ModelLoadError
from makd.registry import Registry

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
