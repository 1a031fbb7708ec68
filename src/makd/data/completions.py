"""Station 2, continued: conversations as tokenized rows, with labels on what the model is to answer and nowhere else.

What was cut, left out or empty is counted, and told in one line.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from makd.anatomy.tokens import IGNORE_INDEX
from makd.data.conversations import MESSAGES, Message
from makd.data.rendering import Conversation, Encoded, make_encoder
from makd.data.settings import Rendering
from makd.data.tokenizers import check_vocabulary
from makd.data.unknown import Known, KnownTokens, check_known
from makd.errors import DataError
from makd.mapped import map_rows

logger = logging.getLogger(__name__)

_FATE = "makd fate"
"""Column of what became of a row; in the data, since `map` may find its result on disk and not run at all."""
_LEARNED = "makd learned"
"""Column of how many tokens have a label."""
_TOKENS = "makd tokens"
"""Column of how many tokens a row has."""
_COUNTED = {"input_ids": "the conversations", "labels": "the responses"}
"""Columns whose tokens are counted, and how they are called."""
WHOLE, CUT, NO_RESPONSE, NO_PROMPT, LONG_PROMPT = "whole", "cut", "no response", "no prompt", "long prompt"
_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "attention_mask": List(Value("int8")),
        "labels": List(Value("int64")),
        _FATE: Value("string"),
        _LEARNED: Value("int32"),
        _TOKENS: Value("int32"),
    }
)


@dataclass(frozen=True, kw_only=True)
class ConversationRow:
    """A conversation as a model reads it."""

    input_ids: list[int]
    labels: list[int]
    """Of each of these tokens; or of those of another side, which an encoder-decoder writes."""
    fate: str
    """What became of it: `WHOLE`, `CUT`, or why it is left out."""
    learned: int
    """Tokens that have a label."""
    tokens: int
    """All of them."""


Reader = Callable[[Sequence[Conversation]], list[ConversationRow]]


class OneText:
    """How a causal language model reads conversations: as one text, which ends with its last answer or is cut.

    Labels are -100 on all that is no answer. A conversation whose answers begin after `max_length` tokens is left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering, max_length: int) -> None:
        """Args are the tokenizer, how conversations become text, and how many tokens a row has at most.

        Raises:
            DataError: as `make_encoder`.
        """
        self.encode, self.max_length = make_encoder(tokenizer, rendering), max_length

    def __call__(self, conversations: Sequence[Conversation]) -> list[ConversationRow]:
        """A row of each."""
        return [_row(encoded, self.max_length) for encoded in self.encode(conversations)]


def encode_conversations(
    rows: Dataset,
    read: Reader,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    vocabulary: int,
    setting: str = "data.max_length",
    cut_level: int = logging.INFO,
) -> Dataset:
    """Rows of `input_ids`, `attention_mask` and `labels`, as `read` makes them.

    Rows are left out whose response or prompt is blank, and those that `read` finds no room for.

    Args:
        rows: conversations.
        read: how the model reads them: `OneText`, or `TwoSides`.
        tokenizer: by which it does.
        max_length: tokens that a row, or a side, was cut at.
        vocabulary: how many tokens the model has embeddings for.
        setting: what the user calls `max_length`.
        cut_level: of the log line, where rows are cut.

    Raises:
        DataError: every response is blank, or no row is left; more than half of the prompts are too long; the template
            refuses a conversation, or answers cannot be found in its text; the tokenizer is another model's, or knows
            nearly nothing of them.
    """

    def encode(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        conversations = list(zip(batch[MESSAGES], batch["given"], strict=True))
        fates = [_find_blank(*one) for one in conversations]
        made = iter(read([one for one, fate in zip(conversations, fates, strict=True) if fate is None]))
        found = [next(made) if fate is None else _left_out(fate) for fate in fates]
        check_vocabulary(chain.from_iterable(row.input_ids for row in found), vocabulary)
        check_vocabulary((token for row in found for token in row.labels if token != IGNORE_INDEX), vocabulary)
        return {
            "input_ids": [row.input_ids for row in found],
            "attention_mask": [[1] * len(row.input_ids) for row in found],
            "labels": [row.labels for row in found],
            _FATE: [row.fate for row in found],
            _LEARNED: [row.learned for row in found],
            _TOKENS: [row.tokens for row in found],
        }

    encoded = map_rows(rows, encode, batched=True, remove_columns=rows.column_names, features=_FEATURES)
    fates = encoded[_FATE][:]
    _check_fates(Counter(fates), len(rows), max_length, setting)
    known = KnownTokens(tokenizer)
    for column, called in _COUNTED.items():
        check_known(Known.sum(map(known.count, encoded[column])), tokenizer, called)
    kept = encoded.select([place for place, fate in enumerate(fates) if fate in (WHOLE, CUT)])
    _log_fates(Counter(fates), kept, max_length, setting, cut_level)
    return kept.remove_columns([_FATE, _LEARNED, _TOKENS])


def _find_blank(messages: Sequence[Message], given: int) -> str | None:
    """The fate of a conversation in which something is blank; None where nothing is."""
    answers = [message["content"] for message in messages[given:] if message["role"] == "assistant"]
    if not answers or not all(answer.strip() for answer in answers):
        return NO_RESPONSE
    asked = all(message["content"].strip() for message in messages if message["role"] == "user")
    return None if asked else NO_PROMPT


def _row(encoded: Encoded, max_length: int) -> ConversationRow:
    ids, learned = encoded.ids[:max_length], encoded.learned[:max_length]
    if not any(learned):
        return _left_out(LONG_PROMPT)
    return ConversationRow(
        input_ids=ids,
        labels=[token if one else IGNORE_INDEX for token, one in zip(ids, learned, strict=True)],
        fate=WHOLE if len(ids) == len(encoded.ids) else CUT,
        learned=sum(learned),
        tokens=len(ids),
    )


def _left_out(fate: str) -> ConversationRow:
    return ConversationRow(input_ids=[], labels=[], fate=fate, learned=0, tokens=0)


def _check_fates(fates: Counter[str], count: int, max_length: int, setting: str) -> None:
    if fates[NO_RESPONSE] == count:
        raise DataError(
            f"All {count:,} rows have a blank response, or no message of the assistant's: there is nothing to learn. "
            "Name the columns with data.prompt_columns and data.response_column, or data.messages_column."
        )
    if fates[NO_PROMPT] + fates[NO_RESPONSE] == count:
        raise DataError(f"All {count:,} rows have a blank prompt or response, so there is nothing to learn.")
    if 2 * fates[LONG_PROMPT] > count:
        raise DataError(
            f"{fates[LONG_PROMPT]:,} of {count:,} rows have a prompt that takes all of {setting} = {max_length} "
            f"tokens, which leaves none for the response. Raise {setting}, or give shorter prompts."
        )


def _log_fates(fates: Counter[str], kept: Dataset, max_length: int, setting: str, cut_level: int) -> None:
    if len(kept) == 0:
        raise DataError("No conversation is left: all are blank, or their prompts are too long. Give others.")
    tokens, learned = sum(kept[_TOKENS]), sum(kept[_LEARNED])
    parts = [
        f"{fates[NO_RESPONSE]:,} without a response left out" if fates[NO_RESPONSE] else "",
        f"{fates[NO_PROMPT]:,} without a prompt left out" if fates[NO_PROMPT] else "",
        f"{fates[LONG_PROMPT]:,} left out whose prompt takes all of {setting} = {max_length} tokens"
        if fates[LONG_PROMPT]
        else "",
        f"{fates[CUT]:,} cut at {setting} = {max_length} tokens" if fates[CUT] else "",
    ]
    odd = "; ".join(part for part in parts if part)
    logger.log(
        logging.WARNING if len(kept) < sum(fates.values()) else cut_level if fates[CUT] else logging.INFO,
        "%s of %s conversations are read: %s tokens, %s of them completions%s",
        f"{len(kept):,}",
        f"{sum(fates.values()):,}",
        f"{tokens:,}",
        f"{learned:,}",
        f" ({odd})" if odd else "",
    )
