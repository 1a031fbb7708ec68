"""Station 2, continued: tokenized conversations taken apart again, for models that are to answer them themselves."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from makd.anatomy.tokens import IGNORE_INDEX
from makd.data.batches import Batch
from makd.errors import DataError

Row = Mapping[str, Any]
"""`input_ids` and `labels`, as `makd.data.tokenize` makes them of conversations."""


def has_completions(rows: Any) -> bool:
    """Whether tokenized text (a data set, or any sequence of rows) is prompts with completions, as labels say."""
    columns = getattr(rows, "column_names", None)
    return "labels" in columns if columns is not None else all("labels" in row for row in rows)


def prompt_of(row: Row) -> list[int]:
    """The tokens before the last answer: what the model is given in use.

    Raises:
        DataError: the row holds no answer.
    """
    return list(row["input_ids"][: _last_answer(row)[0]])


def completion_of(row: Row) -> list[int]:
    """The tokens of the last answer, with what ends it, unless the row was cut.

    Raises:
        DataError: the row holds no answer.
    """
    start, end = _last_answer(row)
    return list(row["input_ids"][start:end])


def written_lengths(rows: Any, most: int, limit: int | None) -> list[int]:
    """Tokens of each row at most, where others of up to `most` tokens may be written in the place of its completion.

    Args:
        rows: a data set, or any other sequence of rows.
        most: tokens of a completion that is written.
        limit: of a row, where the model's positions end; None where nothing sets a bound.

    Raises:
        DataError: a row holds no answer.
    """
    in_columns = isinstance(rows, Dataset)
    ids, labels = ([*rows[name]] if in_columns else [row[name] for row in rows] for name in ("input_ids", "labels"))
    found = []
    for read, learned in zip(ids, labels, strict=True):
        written = _last_answer({"labels": list(learned)})[0] + most
        found.append(max(len(read), written if limit is None else min(written, limit)))
    return found


def reference_of(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of the last answer, without special tokens.

    Raises:
        DataError: the row holds no answer.
    """
    return str(tokenizer.decode(completion_of(row), skip_special_tokens=True)).strip()


def prompt_batch(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """The prompts of `rows`, padded on the left, so that the model goes on right after each: for `generate`.

    Returns:
        `input_ids` and `attention_mask`, (rows, longest prompt).

    Raises:
        DataError: a row holds no answer, or nothing stands before it.
    """
    prompts = [prompt_of(row) for row in rows]
    if not prompts or not all(prompts):
        raise DataError("A batch of prompts needs at least one row, and each row a token before its answer.")
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pad_prompts(prompts, 0 if filler is None else int(filler))


def pad_prompts(prompts: Sequence[Sequence[int]], padding: int, side: Literal["left", "right"] = "left") -> Batch:
    """A batch: `input_ids` and `attention_mask`. Rows padded on the left end together, as a model goes on from them."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        real = slice(width - len(prompt), width) if side == "left" else slice(len(prompt))
        ids[place, real] = torch.tensor(prompt)
        mask[place, real] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _last_answer(row: Row) -> tuple[int, int]:
    """Where the last run of labelled tokens begins and ends."""
    labels = row.get("labels") or []
    learned = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
    if not learned:
        raise DataError("A row holds no answer: none of its tokens has a label. Give rows of prompts with responses.")
    end = start = learned[-1]
    while start > 0 and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return start, end + 1
