"""Station 2, continued: what a tokenizer puts around a text of its own accord, and what room that leaves."""

import copy
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.limits import token_limit
from makd.errors import DataError

_PROBE = "a text"


@dataclass(frozen=True)
class Marks:
    """Token ids before and after each text, such as Llama's begin-of-text, or BERT's [CLS] and [SEP]."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    def put(self, ids: list[int]) -> list[int]:
        """`ids` with the marks, but for those that the text itself holds there, as rendered conversations do."""
        first, last = list(self.before), list(self.after)
        if first and ids[: len(first)] == first:
            first = []
        if last and ids[-len(last) :] == last:
            last = []
        return first + ids + last


def find_marks(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """The marks that `tokenizer` puts around a single text.

    Raises:
        DataError: it gives another text with marks than without, or has no token for any.
    """
    tokenizer = copy.deepcopy(tokenizer)  # encoding changes its truncation, and it may be saved with a student
    probe, plain = _probe(tokenizer)
    marked = list(tokenizer(probe)["input_ids"])
    for start in range(len(marked) - len(plain) + 1):
        if marked[start : start + len(plain)] == plain:
            return Marks(tuple(marked[:start]), tuple(marked[start + len(plain) :]))
    raise DataError(
        f"The tokenizer reads {probe!r} as {marked} with special tokens and as {plain} without, so what it adds to a "
        "text cannot be told. Give the tokenizer that the model was trained with."
    )


def _probe(tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """A text of which `tokenizer` knows something, and its ids without marks: nothing cannot be found between marks.

    Vocabularies of Chinese, music or molecules alone may have no letter of `_PROBE`, and no token for unknown ones.
    """
    own = [number for number in sorted(tokenizer.get_vocab().values()) if number not in tokenizer.all_special_ids]
    for probe in chain((_PROBE,), (str(tokenizer.decode([number])) for number in own)):
        ids = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        if ids:
            return probe, ids
    raise DataError(
        f"The tokenizer has no token for {_PROBE!r}, nor for what its own {len(own):,} tokens stand for: it reads "
        "every text as nothing. Give the tokenizer that the model was trained with."
    )


def given_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that a causal language model is given and never has to predict: those before a text.

    Not a token that also ends a text: OPT has one for both, which is to be predicted.
    """
    marks = find_marks(tokenizer)
    return tuple(token for token in marks.before if token not in (tokenizer.eos_token_id, *marks.after))


def check_room(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, length: int, setting: str, texts: int = 1
) -> None:
    """Refuse a `length` of more tokens than the model has positions, or with no room for a token of each of `texts`.

    Args:
        tokenizer: whose own tokens take room.
        model: whose positions are counted.
        length: tokens of a row, at most.
        setting: what the user calls that number.
        texts: 1, or 2 for pairs.

    Raises:
        DataError: `length` is too long for the model, or too short for the texts; or the model has too few token
            types for pairs.
    """
    limit = token_limit(model)
    if limit is not None and limit < length:
        raise DataError(
            f"{setting} is {length} tokens, but {type(model).__name__} has positions for {limit}; lower it to {limit} "
            "or less."
        )
    own = tokenizer.num_special_tokens_to_add(pair=texts == 2)
    if length < own + texts:
        raise DataError(
            f"{setting} is {length} tokens, and the tokenizer puts {own} of its own into each row, which leaves "
            f"{max(0, length - own)} for {'a text' if texts == 1 else 'two texts'}; raise it to {own + texts} or more."
        )
    kinds = getattr(model.config, "type_vocab_size", None)
    found = copy.deepcopy(tokenizer)(*[_PROBE] * texts).get("token_type_ids", [0])
    if isinstance(kinds, int) and 0 < kinds <= max(found):
        raise DataError(
            f"The tokenizer gives token type {max(found)}, but {type(model).__name__} knows {kinds} (type_vocab_size), "
            "from 0. Give the tokenizer that this model was trained with, or take 'token_type_ids' out of this one's "
            "model_input_names."
        )
