"""The head of a task: made new and seeded on a base model, or checked on a model that has been taught the task."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from makd.anatomy import predictions_of
from makd.anatomy.predictions import Target
from makd.errors import SettingError
from makd.loading import load_config, load_learner, locate
from makd.tasks.labels import place_outputs
from makd.tasks.rows import TaskRows
from makd.tasks.settings import TaskConfig

logger = logging.getLogger(__name__)

PROBLEM_TYPES = {"classification": "single_label_classification", "multi_label": "multi_label_classification"}
"""Kind of task -> what transformers calls it."""
TARGETS: dict[str, Target] = {
    "classification": "classes",
    "multi_label": "labels",
    "regression": "numbers",
    "token_classification": "classes",
}
"""Kind of task -> what a model of it predicts."""


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
        ModelLoadError: the model cannot be loaded.
    """
    kind = rows.config.kind
    config = load_config(name) if locate(name).gguf_file is None else None
    if config is not None:
        _refuse_decoder(rows.config, config.model_type, name)
    settings = _config(rows)
    has_head = any(kind.classes in cls for cls in getattr(config, "architectures", None) or ())
    if config is not None and has_head and settings.get("num_labels", 2) != config.num_labels:
        logger.info("the head of %s, for %d labels, is replaced", name, config.num_labels)
    elif config is not None and has_head and "id2label" in settings:
        settings |= _kept_names(rows, _names(config, len(rows.labels)), name)
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
        return {"num_labels": max(1, len(rows.labels)), "problem_type": "regression"}
    names = dict(enumerate(rows.config.labels or rows.labels))
    found: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: place for place, name in names.items()},
    }
    return found | ({"problem_type": PROBLEM_TYPES[kind]} if kind in PROBLEM_TYPES else {})


def _kept_names(rows: TaskRows, theirs: Sequence[str], name: str) -> dict[str, Any]:
    """The labels of a head that is kept, as its outputs have them. One of another task may mean anything by them."""
    generic = list(theirs) == [f"LABEL_{place}" for place in range(len(theirs))]
    if not generic and sorted(map(str.lower, theirs)) != sorted(map(str.lower, rows.labels)):
        return {}
    order = place_outputs(rows.config, rows.labels, theirs, name)
    names = {place: rows.labels[label] for place, label in enumerate(order)}
    return {"id2label": names, "label2id": {label: place for place, label in names.items()}}


def check_head(model: PreTrainedModel, config: TaskConfig, labels: Sequence[str]) -> tuple[int, ...]:
    """Refuse a `model` that does not predict what the task asks for: its kind of head, its labels by their names.

    Returns:
        For each output of the head its place in `labels`; empty where labels have no names.

    Raises:
        SettingError: the head is of another kind, or has other labels.
    """
    name, cls, kind = model.name_or_path or "the model", type(model).__name__, config.kind
    if not cls.endswith(kind.classes):
        _refuse_decoder(config, model.config.model_type, name)
        data = "" if config.path is None else f" --task_data {config.path}"
        raise SettingError(
            f"The task {config.name} needs a model with the head {kind.head}; {name} is a {cls}. Make one with "
            f"`makd finetune {name} --task {config.name}{data} --output runs/teacher`, with the task's other settings "
            "as here, and take that as teacher."
        )
    if config.known.kind == "question_answering":
        return ()
    wanted = max(1, len(labels))
    if model.config.num_labels != wanted:
        raise SettingError(
            f"{name} predicts {model.config.num_labels} labels; the task {config.name} has {wanted}"
            f"{': ' + ', '.join(labels) if labels else ' (a number)'}. Take a model that was fine-tuned on this task."
        )
    target, found = TARGETS[config.known.kind], predictions_of(model)
    if found is None or found.target != target:
        raise SettingError(
            f"The task {config.name} has {target} to predict; {name} predicts {found}, by its config (problem_type "
            f"{getattr(model.config, 'problem_type', None)!r}, num_labels {model.config.num_labels}). Take a model "
            "that was fine-tuned on this task, or correct its config.json."
        )
    if config.known.kind == "regression":
        return ()
    return place_outputs(config, labels, _names(model.config, wanted), name)


def _names(config: PretrainedConfig, count: int) -> list[str]:
    """What a model's config calls the outputs of its head."""
    names = {int(place): str(label) for place, label in (config.id2label or {}).items()}
    return [names.get(place, f"LABEL_{place}") for place in range(count)]


def _refuse_decoder(config: TaskConfig, model_type: str, name: str) -> None:
    """Places in a text need both of its sides: a start is known only after what follows it was read."""
    one_sided = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if config.known.kind == "question_answering" and one_sided:
        raise SettingError(
            f"The task {config.name} marks places in a text, which takes an encoder; {name} is a decoder "
            f"({model_type}), whose tokens do not see what follows. Take an encoder such as a BERT."
        )
