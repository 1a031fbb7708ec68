"""Station 9: the README.md of a student, so that who finds the folder knows what it is and how to load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from makd.report.metadata import Data, card_metadata, find_source
from makd.report.tables import metrics_markdown

TEMPLATE = """---
{metadata}
---

# A smaller {architecture}

Made by [makd](https://arxiv.org/abs/2604.03110) from `{teacher}`: its linears are low-rank factors, taught to mimic the
original. Where makd is installed it loads as any other model (no remote code):

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

{table}
{latency}Fidelity: on held-out text. All settings are in `recipe.yaml`, all numbers in `metrics.json`,
versions and machine in `environment.json`. {again}{licence}
"""
LATENCY = """\
Latency: median of forwards of {tokens} tokens a row on {device_name} with {threads} threads, teacher and
student taking turns. """
NO_LICENCE = " The teacher's licence was not at hand: look it up before you publish."


def write_card(
    folder: Path,
    name: str,
    teacher: str,
    architecture: str,
    metrics: Mapping[str, Any],
    environment: Mapping[str, Any],
    command: str | None,
    data: Data,
) -> None:
    """Write the card of the student in `folder`, which will be called `name`.

    `command` is what repeats the run from its recipe; None where a recipe cannot hold its data.
    """
    source = find_source(teacher)
    metadata = card_metadata(folder, name, source, architecture, metrics, data)
    heads = {
        "ForCausalLM": "AutoModelForCausalLM",
        "LMHeadModel": "AutoModelForCausalLM",
        "ForMaskedLM": "AutoModelForMaskedLM",
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForTokenClassification": "AutoModelForTokenClassification",
        "ForQuestionAnswering": "AutoModelForQuestionAnswering",
        "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    }
    auto_class = next((auto for suffix, auto in heads.items() if architecture.endswith(suffix)), "AutoModel")
    text = TEMPLATE.format(
        metadata=metadata.to_yaml(),
        architecture=architecture,
        teacher=source.name,
        auto_class=auto_class,
        folder=name,
        table=metrics_markdown(metrics),
        latency=LATENCY.format(tokens=metrics["latency_tokens"], **environment) if "latency_tokens" in metrics else "",
        again="Its texts were in hand, and no file names them."
        if command is None
        else f"`{command} --config recipe.yaml --output ANOTHER` repeats the run.",
        licence=NO_LICENCE if metadata.license is None else "",
    )
    ModelCard(text).save(folder / "README.md")
