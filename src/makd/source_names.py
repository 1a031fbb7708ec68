"""What models and tokenizers are called, in recipes and for a person. Stands below every station."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def name_of(source: str | PreTrainedModel | PreTrainedTokenizerBase) -> str:
    """A name as it is; of what is in hand, where it was loaded from, or the class of one that was made in Python."""
    return source if isinstance(source, str) else source.name_or_path or type(source).__name__


def tokenizer_name(tokenizer: str | PreTrainedTokenizerBase | None) -> str | None:
    """What the recipe calls a tokenizer; None for the teacher's."""
    return None if tokenizer is None else name_of(tokenizer)
