"""Station 9: the README.md of a student, so that who finds the folder knows what it is and how to load it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard

from makd.measures import compares_pair
from makd.run_folder.metadata import Data, auto_class_of, card_metadata, find_source
from makd.run_folder.tables import metrics_markdown

TEMPLATE = """---
{metadata}
---

# A smaller {architecture}

Made by [makd](https://arxiv.org/abs/2604.03110) from `{teacher}`: {made}.
Where makd is installed it loads as any other model (no remote code):

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

{table}
{latency}{fidelity}All settings are in `recipe.yaml`, all numbers in `metrics.json`,
versions and machine in `environment.json`. {again}{licence}
"""
LATENCY = """\
Latency: median of forwards of {tokens} tokens a row on {device_name} with {threads} threads, teacher and
student taking turns. """
FIDELITY = "Fidelity: on held-out text. "
REPEATS = "--config recipe.yaml --output ANOTHER` repeats the run."
NO_LICENCE = " The teacher's licence was not at hand: look it up before you publish."


FACTORED = "its linears are low-rank factors"
Kind = Literal["factored", "shallow", "dense"]
KINDS: Mapping[Kind, str] = {
    "factored": FACTORED,
    "shallow": "the same without some of its layers",
    "dense": "a dense model of its own",
}
"""What a student is, by what is in the place of the teacher's linears and layers -> for a reader."""


def write_card(
    folder: Path,
    name: str,
    teacher: str,
    architecture: str,
    metrics: Mapping[str, Any],
    environment: Mapping[str, Any],
    command: str,
    data: Data,
    *,
    kind: Kind,
) -> None:
    """Write the card of a student. It says of it what was done, and what is there.

    Args:
        folder: where the student is.
        name: what that folder will be called.
        teacher: as the run calls it.
        architecture: the student's class.
        metrics: as metrics.json has them.
        environment: as environment.json has it.
        command: of makd's that made the student.
        data: of the run; None where its texts were in hand, which no recipe holds.
        kind: of student: with anything low-rank in it, with nothing but layers left out, or neither.
    """
    source = find_source(teacher)
    lessons = "training" if metrics["tokens"]["training"] else "layers" if metrics.get("layerwise") else None
    tags = ("low-rank",) * (kind == "factored") + ("distillation",) * (lessons is not None)
    metadata = card_metadata(folder, name, source, architecture, metrics, data, tags)
    text = TEMPLATE.format(
        metadata=metadata.to_yaml(),
        architecture=architecture,
        teacher=source.name,
        auto_class=auto_class_of(architecture),
        folder=name,
        table=metrics_markdown(metrics),
        made=", ".join(filter(None, (KINDS[kind], _taught(lessons, command)))),
        fidelity=FIDELITY if metrics.get("fidelity") else "",
        latency=_latency(metrics, environment),
        again="Its texts were in hand, and no file names them." if data is None else f"`makd {command} {REPEATS}",
        licence=NO_LICENCE if metadata.license is None else "",
    )
    ModelCard(text).save(folder / "README.md")


def folded_card(
    card: str,
    name: str,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> str:
    """The card of a student, made that of the same with some linears dense again; what others wrote in it stays.

    Args:
        card: of the student with factors.
        name: what the other's folder will be called.
        old: metrics of the student with factors.
        new: metrics of the other.
        environment: of the run that made the student with factors.
    """
    folded = new.get("folded", ())
    if compares_pair(old):
        card = card.replace(metrics_markdown(old), metrics_markdown(new))
    lines = re.compile(r'^((?:model|tokenizer) = \w+\.from_pretrained\()"[^"\n]*"\)$', re.MULTILINE)
    card = lines.sub(lambda found: f'{found[1]}"{name}")', card, count=2)  # those that makd wrote stand first
    if "latency_tokens" in old:
        card = card.replace(_latency(old, environment), "")
    if folded:
        card = card.replace(FACTORED, f"{FACTORED}, {len(folded)} of them dense again where that is faster", 1)
        then = f"{REPEATS.removesuffix('.')} before `makd bench --fold`."
        card = card.replace(REPEATS, then, 1)
    return card


def _latency(metrics: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """What was timed, as a sentence; empty where nothing was."""
    tokens = metrics.get("latency_tokens")
    return "" if tokens is None else LATENCY.format(tokens=tokens, **environment)


def _taught(lessons: str | None, command: str) -> str:
    """How a student was taught; empty where that was not this run's matter."""
    if lessons is not None:
        return "taught to mimic the original" if lessons == "training" else "its layers taught to mimic the original's"
    return "" if command == "distill" else "not trained yet"
