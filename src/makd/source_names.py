"""What a run calls its sources: models, tokenizers and data, as recipes and refusals name them."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.data import DataConfig
from makd.preparation import Data
from makd.tasks import TaskConfig


def names_of(data: Data) -> list[str | None]:
    """The paths that data have."""
    if isinstance(data, TaskConfig):
        return [data.path or data.known.path, data.extra_text]
    return [*data.paths] if isinstance(data, DataConfig) else [data if isinstance(data, str) else None]


def tokenizer_name(tokenizer: str | PreTrainedTokenizerBase | None) -> str | None:
    """What the recipe calls a tokenizer; None for the teacher's."""
    return tokenizer if tokenizer is None or isinstance(tokenizer, str) else _in_hand(tokenizer)


def name_of(model: str | PreTrainedModel) -> str:
    """What the recipe calls a model."""
    return model if isinstance(model, str) else _in_hand(model)


def _in_hand(source: PreTrainedModel | PreTrainedTokenizerBase) -> str:
    """Where it was loaded from; the class of one that was made in Python."""
    return source.name_or_path or type(source).__name__
