"""Station 2, continued: plain text for causal language models, as blocks of joined texts or one text a row."""

import logging
from itertools import chain

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from makd.data.marks import Marks, find_marks, given_tokens
from makd.data.tokenizers import check_vocabulary
from makd.data.unknown import Known, KnownTokens, check_known
from makd.errors import DataError

logger = logging.getLogger(__name__)


def join_texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, vocabulary: int) -> Dataset:
    """Blocks of the joined texts, each beginning as a text does.

    Raises:
        DataError: the texts are shorter than one block, or the tokenizer is another model's or knows nearly nothing.
    """
    marks = find_marks(tokenizer)
    ids = list(chain.from_iterable(_marked(rows, tokenizer, marks)))
    check_vocabulary(ids, vocabulary)
    blocks = _cut(ids, list(marks.before), length)
    if not blocks:
        raise DataError(
            f"The text has {len(ids)} tokens, fewer than one block of data.max_length = {length}; "
            "give more text or shorter blocks."
        )
    return Dataset.from_dict({"input_ids": blocks, "attention_mask": [[1] * length] * len(blocks)})


def keep_apart(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, vocabulary: int, setting: str
) -> Dataset:
    """One text a row, cut at `length` tokens: none attends to another, or is predicted from it.

    Texts that leave nothing to predict are left out. How many these are, and how many were cut, is told.

    Raises:
        DataError: no text is left, or the tokenizer is another model's or knows nearly nothing.
    """
    given, marks = set(given_tokens(tokenizer)), find_marks(tokenizer)
    texts = _marked(rows, tokenizer, marks)
    check_vocabulary(chain.from_iterable(texts), vocabulary)
    cut = [ids[:length] for ids in texts]
    kept = [ids for ids in cut if any(token not in given for token in ids[1:])]
    if not kept:
        raise DataError(f"None of {len(texts)} texts has a token to predict, cut at {setting} = {length}. Give others.")
    longer = sum(len(ids) > length for ids in texts)
    logger.log(
        logging.WARNING if len(kept) < len(texts) else logging.INFO,
        "%s of %s texts are read, each on its own: %s tokens (%s cut at %s = %d tokens, %s of one token left out)",
        f"{len(kept):,}",
        f"{len(texts):,}",
        f"{sum(map(len, kept)):,}",
        f"{longer:,}",
        setting,
        length,
        f"{len(texts) - len(kept):,}",
    )
    return Dataset.from_dict({"input_ids": kept, "attention_mask": [[1] * len(ids) for ids in kept]})


def _marked(rows: Dataset, tokenizer: PreTrainedTokenizerBase, marks: Marks) -> list[list[int]]:
    """The tokens of each text, with what stands around it.

    A text has the marks that the tokenizer puts around it. Only where it puts none, end-of-text follows each: a model
    whose texts begin with a mark may never have seen an end.
    """
    end = tokenizer.eos_token_id
    closing = [end] if end is not None and marks == Marks((), ()) else []
    known = KnownTokens(tokenizer)
    texts = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in rows["text"]]
    check_known(Known.sum(map(known.count, texts)), tokenizer)
    return [marks.put(ids) + closing for ids in texts]


def _cut(ids: list[int], before: list[int], length: int) -> list[list[int]]:
    """Blocks of exactly `length` tokens, each beginning with `before`; what is left over is no block."""
    blocks: list[list[int]] = []
    place = 0
    while True:
        first = [] if ids[place : place + len(before)] == before else before
        rest = length - len(first)
        if place + rest > len(ids):
            return blocks
        blocks.append(first + ids[place : place + rest])
        place += rest
