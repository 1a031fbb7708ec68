"""Station 9: the README.md of a student, so that who finds the folder knows what it is and how to load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from makd.report.tables import metrics_markdown

TEMPLATE = """---
library_name: transformers
tags: [makd, low-rank, distillation]
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
Latency: median of forwards of {latency_tokens} tokens a row on {device_name} with {threads} threads, teacher and
student taking turns. Fidelity: on held-out text. All settings are in `recipe.yaml`, all numbers in `metrics.json`,
versions and machine in `environment.json`. {again}
"""


def write_card(
    folder: Path,
    name: str,
    teacher: str,
    architecture: str,
    metrics: Mapping[str, Any],
    environment: Mapping[str, Any],
    latency_tokens: int,
    command: str | None,
) -> None:
    """Write the card of the student in `folder`, which will be called `name`.

    `command` is what repeats the run from its recipe; None where a recipe cannot hold its data.
    """
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
        architecture=architecture,
        teacher=teacher,
        auto_class=auto_class,
        folder=name,
        table=metrics_markdown(metrics),
        latency_tokens=latency_tokens,
        device_name=environment["device_name"],
        threads=environment["threads"],
        again="Its texts were in hand, and no file names them."
        if command is None
        else f"`{command} --config recipe.yaml --output ANOTHER` repeats the run.",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
