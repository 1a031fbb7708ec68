"""The head of a task: made new and seeded on a base model, or checked on a model that has been taught the task."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from makd.errors import SettingError
from makd.loading import load_config, load_learner, locate
from makd.tasks.rows import TaskRows
from makd.tasks.settings import TaskConfig

logger = logging.getLogger(__name__)


def load_task_model(
    name: str,
    rows: TaskRows,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The model called `name` under the head of a task. A head that it has is kept if it is for as many labels.

    Args:
        name: as for `makd.loading.load_learner`; a student's linears stay factored.
        rows: the task, which says how many labels there are and how they are called.
        tokenizer: says which token is padding, where the model's config does not.
        seed: of a new head.
        dtype: of the weights.
        device: where they go.

    Raises:
        SettingError: no such head fits this model.
        ModelLoadError: it cannot be loaded.
    """
    kind = rows.config.kind
    config = load_config(name) if locate(name).gguf_file is None else None
    if config is not None:
        _refuse_decoder(rows.config, config.model_type, name)
    settings = _config(rows)
    has_head = any(kind.classes in cls for cls in getattr(config, "architectures", None) or ())
    if config is not None and has_head and settings.get("num_labels", 2) != config.num_labels:
        logger.info("the head of %s, for %d labels, is replaced", name, config.num_labels)
    set_seed(seed)
    model = load_learner(name, kind.head, dtype, device, **settings)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _config(rows: TaskRows) -> dict[str, Any]:
    """What the model's config says of the task."""
    kind = rows.config.known.kind
    if kind == "question_answering":
        return {}
    if kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    names = dict(enumerate(rows.labels))
    found: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: place for place, name in names.items()},
    }
    return found | ({"problem_type": "single_label_classification"} if kind == "classification" else {})


def check_head(model: PreTrainedModel, config: TaskConfig, labels: Sequence[str]) -> None:
    """Whether `model` predicts what the task asks for: this kind of head, as many labels, in this order.

    Raises:
        SettingError: it does not.
    """
    name, cls, kind = model.name_or_path or "the model", type(model).__name__, config.kind
    if not cls.endswith(kind.classes):
        _refuse_decoder(config, model.config.model_type, name)
        raise SettingError(
            f"The task {config.name} needs a model with the head {kind.head}; {name} is a {cls}. Make one with "
            f"`makd finetune {name} --task {config.name} --output runs/teacher`, and take that as teacher."
        )
    if config.known.kind == "question_answering":
        return
    wanted = max(1, len(labels))
    if model.config.num_labels != wanted:
        raise SettingError(
            f"{name} predicts {model.config.num_labels} labels; the task {config.name} has {wanted}"
            f"{': ' + ', '.join(labels) if labels else ' (a number)'}. Take a model that was fine-tuned on this task."
        )
    names = {int(place): str(label) for place, label in (model.config.id2label or {}).items()}
    theirs = [names.get(place, f"LABEL_{place}") for place in range(wanted)]
    if not labels or [label.lower() for label in theirs] == [label.lower() for label in labels]:
        return
    if theirs == [f"LABEL_{place}" for place in range(wanted)]:
        logger.warning("%s does not say what its labels mean; they are taken to be %s", name, ", ".join(labels))
        return
    raise SettingError(
        f"{name} has the labels {', '.join(theirs)}, in this order; the task {config.name} has {', '.join(labels)}. "
        "Take a model that was fine-tuned on this task, or, for data without names of its own, give its order with "
        "task.labels."
    )


def _refuse_decoder(config: TaskConfig, model_type: str, name: str) -> None:
    """Places in a text need both of its sides: a start is known only after what follows it was read."""
    one_sided = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.known.kind == "question_answering" and one_sided:
        raise SettingError(
            f"The task {config.name} marks places in a text, which takes an encoder; {name} is a decoder "
            f"({model_type}), whose tokens do not see what follows. Take an encoder such as a BERT."
        )
