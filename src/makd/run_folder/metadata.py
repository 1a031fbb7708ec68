"""Station 9: what the hub reads at the head of a student's card: what it was made from, on what, and how well it does.

Nothing is guessed and nothing is asked of the network. A name is one of the hub's where files of it are in the hub's
cache on this machine, or where the data was loaded from there. Licence and languages are what the teacher's own card
says, beside its weights or in that cache; they are left out where there is none.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from makd.anatomy.predictions import class_names
from makd.data import DataConfig
from makd.data.settings import BUILT_IN
from makd.errors import ModelLoadError
from makd.loading import PACKAGE_SCHEME, locate
from makd.measures import known_metric, task_label
from makd.run_folder.record import is_on_disk
from makd.tasks import TaskConfig

Data = DataConfig | TaskConfig | None
"""Of a run; None where its texts were in hand."""

HUB = "https://huggingface.co"
_CARD = "README.md"
_TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageTextToText": "image-text-to-text",
    "Model": "feature-extraction",
}
"""How names of classes end -> the hub's task. It has none of its own for encoder-decoders any more."""
_AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageTextToText": "AutoModelForImageTextToText",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}
"""How names of classes end -> transformers' class that loads them by their folder."""
_NAMED_OTHERWISE = {
    name: end
    for end, names in {
        "ForImageTextToText": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "ForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }.items()
    for name in class_names(names)
}
"""Class -> how it would end by what it does; `Gemma3ForConditionalGeneration` is no encoder-decoder."""
_METRICS = {
    "accuracy": "accuracy",
    "subset_accuracy": "accuracy",
    "token_accuracy": "accuracy",
    "f1": "f1",
    "macro_f1": "f1",
    "micro_f1": "f1",
    "entity_f1": "f1",
    "answerable_f1": "f1",
    "unanswerable_f1": "f1",
    "entity_precision": "precision",
    "entity_recall": "recall",
    "r2": "r_squared",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "exact_match": "exact_match",
}
"""Metric of a task -> the hub's. `score`, the mean of several, has none."""


@dataclass(frozen=True)
class Source:
    """Where a teacher is from."""

    name: str
    """As a reader elsewhere may know it: of a folder on this machine the last part of its path."""
    hub_id: str | None
    card: Mapping[str, Any]
    """What the head of its own card says; empty where there is none that can be read."""


def auto_class_of(architecture: str) -> str:
    """Transformers' class that loads a model of the class `architecture` by its folder."""
    return _by_end(architecture, _AUTO_CLASSES) or "AutoModel"


def _by_end(architecture: str, known: Mapping[str, str]) -> str | None:
    name = _NAMED_OTHERWISE.get(architecture, architecture)
    return next((known[end] for end in known if name.endswith(end)), None)


def find_source(teacher: str) -> Source:
    """Where the teacher called `teacher` is from, by what is on this machine."""
    hub_id = None if _is_here(teacher) else _cached_id(teacher)
    if hub_id is not None:
        cached = try_to_load_from_cache(hub_id, _CARD)
        return Source(hub_id, hub_id, _read_card(Path(cached)) if isinstance(cached, str) else {})
    folders = [Path(teacher)]
    try:
        folders.append(Path(locate(teacher).folder))
    except ModelLoadError:  # a model in hand, whose name is no file's
        return Source(teacher, None, {})
    hub_id = next((found for folder in folders if (found := _snapshot_of(folder)) is not None), None)
    cards = (_read_card(folder / _CARD) for folder in folders)
    known = Path(teacher).name if Path(teacher).exists() else teacher
    return Source(hub_id or known, hub_id, next((card for card in cards if card), {}))


def card_metadata(
    folder: Path,
    name: str,
    source: Source,
    architecture: str,
    metrics: Mapping[str, Any],
    data: Data,
    tags: tuple[str, ...],
) -> ModelCardData:
    """The head of the card of the student in `folder`, which will be called `name`; `tags` say what was done."""
    sentences = (folder / "modules.json").is_file()
    results = [] if not isinstance(data, TaskConfig) else list(_results(metrics.get("task"), data))
    measured = [result.metric_type for result in results] + (["perplexity"] if "perplexity" in metrics else [])
    licence = _licence(source)
    tag = _by_end(architecture, _TASKS)
    return ModelCardData(
        base_model=source.hub_id,
        base_model_relation=None if source.hub_id is None else "finetune",
        datasets=list(dict.fromkeys(_data_ids(data))) or None,
        language=_languages(source.card.get("language")),
        library_name="transformers",
        metrics=list(dict.fromkeys(measured)) or None,
        pipeline_tag="sentence-similarity" if sentences else tag,
        tags=["makd", *tags, *(["sentence-transformers"] if sentences else [])],
        model_name=name if results else None,
        eval_results=results or None,
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
    )


def _is_here(name: str) -> bool:
    return name.startswith(PACKAGE_SCHEME) or is_on_disk(name)


def _cached_id(name: str) -> str | None:
    """`name`, if the hub's cache has a model of that name."""
    try:
        return name if isinstance(try_to_load_from_cache(name, "config.json"), str) else None
    except HFValidationError:
        return None


def _snapshot_of(folder: Path) -> str | None:
    """The hub id of a folder inside the hub's cache: `models--ORG--NAME/snapshots/REVISION`."""
    for above in (folder, *folder.parents):
        if above.parent.name == "snapshots" and above.parent.parent.name.startswith("models--"):
            return above.parent.parent.name.removeprefix("models--").replace("--", "/")
    return None


def _read_card(path: Path) -> Mapping[str, Any]:
    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # the student needs none
        return {}


def _licence(source: Source) -> dict[str, str]:
    """What the teacher's card says of its licence, if the hub takes it so: `other` needs a name."""
    found = {key: source.card.get(key) for key in ("license", "license_name", "license_link")}
    texts = {key: value for key, value in found.items() if isinstance(value, str) and value}
    link = texts.get("license_link")
    if link is not None and not urlsplit(link).scheme:  # of a file beside the teacher's weights
        texts.pop("license_link")
        if source.hub_id is not None:
            texts["license_link"] = f"{HUB}/{source.hub_id}/blob/main/{link}"
    if "license" not in texts or (texts["license"] == "other" and "license_name" not in texts):
        return {}
    return texts


def _languages(found: Any) -> str | list[str] | None:
    """Codes as the hub knows them; YAML reads Norwegian's as false."""
    if isinstance(found, list):
        codes = [code for code in ("no" if one is False else one for one in found) if isinstance(code, str)]
        return codes or None
    return "no" if found is False else found if isinstance(found, str) and found else None


def _data_ids(data: Data) -> Iterator[str]:
    """Ids of the data sets of a run that were loaded from the hub: what is no file here."""
    if isinstance(data, TaskConfig):
        names = [data.path or data.known.path, data.extra_text]
    else:
        names = [path for path in data.paths if path != BUILT_IN] if data is not None and data.is_named else []
    for name in names:
        if name is not None and _is_data_id(name):
            yield name


def _is_data_id(name: str) -> bool:
    if _is_here(name) or re.search(r"\.\w+$", name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _results(task: Mapping[str, Any] | None, config: TaskConfig) -> Iterator[EvalResult]:
    """What the student was measured at on its task; the mean of several metrics is left out."""
    where = next(_data_ids(config), None)
    splits = (task or {}).get("splits", ())  # those that were measured on, which need not be the official ones
    tag = _TASKS[config.kind.classes]
    for name, value in (task or {}).get("after", {}).items():
        metric = _METRICS.get(known_metric(name))
        if metric is None:
            continue
        yield EvalResult(
            task_type=tag,
            dataset_type=config.name if where is None else where,
            dataset_name=config.name,
            dataset_config=config.configuration or (None if config.path else config.known.configuration),
            dataset_split=splits[0] if len(splits) == 1 else None,
            dataset_args=None if config.evaluation_rows is None else {"rows": config.evaluation_rows},
            metric_type=metric,
            metric_name=task_label(name),
            metric_value=float(value),
        )
