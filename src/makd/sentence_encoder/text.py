"""Texts as sentence-transformers gives them to the model: in lower case, after a prompt, cut at a length."""

import copy
import logging

from datasets import Dataset
from tokenizers.normalizers import Lowercase, Sequence
from transformers import PreTrainedTokenizerBase

from makd.errors import SettingError
from makd.mapped import map_rows
from makd.sentence_encoder.encoder import read_text_settings
from makd.sentence_encoder.layout import Origin, find_folder

logger = logging.getLogger(__name__)


def as_in_folder(tokenizer: PreTrainedTokenizerBase, model: str) -> PreTrainedTokenizerBase:
    """A tokenizer that reads in lower case, if the sentence-transformers folder of `model` says so; else the same.

    Args:
        tokenizer: it is not changed.
        model: folder or hub id.

    Raises:
        SettingError: the tokenizer cannot be made to.
    """
    folder = find_folder(model)
    if folder is None or not read_text_settings(folder).do_lower_case:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.is_fast:
        normalizer = tokenizer.backend_tokenizer.normalizer
        one = [] if normalizer is None else [normalizer]
        inner = list(normalizer) if isinstance(normalizer, Sequence) else one  # type: ignore[call-overload]
        if not any(isinstance(each, Lowercase) for each in inner):
            tokenizer.backend_tokenizer.normalizer = Sequence([Lowercase(), *inner])
    else:
        tokenizer.do_lower_case = True
    if tokenizer.tokenize("A B C") != tokenizer.tokenize("a b c"):
        raise SettingError(
            f"{folder} has do_lower_case, which {type(tokenizer).__name__} cannot carry out. Give a fast tokenizer, or "
            "set do_lower_case to false."
        )
    return tokenizer


def default_prompt(origin: Origin) -> str:
    """What sentence-transformers puts before every text of the model from `origin`; "" for nothing."""
    folder = find_folder(origin.name)
    return "" if folder is None else read_text_settings(folder).prompt


def with_prompt(rows: Dataset, prompt: str) -> Dataset:
    """The rows with `prompt` before every `text`; rows without texts as they are."""
    if not prompt or "text" not in rows.column_names:
        return rows
    return map_rows(rows, lambda batch: {"text": [prompt + (text or "") for text in batch["text"]]}, batched=True)


def shortest(max_length: int, origin: Origin, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a text, at most: `max_length`, or where sentence-transformers cuts for `origin`, if that is less."""
    folder = find_folder(origin.name)
    if folder is None:
        return max_length
    limit = read_text_settings(folder).max_seq_length or tokenizer.model_max_length
    if limit >= max_length:
        return max_length
    logger.warning(
        "Texts are cut at %d tokens, not at data.max_length %d: %s reads no more of a text.", limit, max_length, folder
    )
    return limit
