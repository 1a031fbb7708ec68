"""Station 8: a few held-out texts, and what teacher and student make of them, for a person to look at.

Decoders write on, greedily; sentence encoders find the texts that are nearest. What is kept holds text of the data.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy import resolve
from makd.anatomy.batches import model_inputs
from makd.anatomy.eval_mode import in_eval
from makd.anatomy.key_cache import without_cache
from makd.anatomy.limits import token_limit
from makd.anatomy.tokens import IGNORE_INDEX, encoder_tokens
from makd.data import collator, reads_blocks
from makd.data.prompts import has_completions, prompt_of, reference_of
from makd.generation import Sampling, generate, stop_tokens
from makd.sentence_encoder import AUTO, encoder_of, origin_of

WRITTEN = Sampling(temperature=0.0, max_new_tokens=32)
"""Greedy and short: what both write is compared word by word, and seconds are enough."""
PROMPT_TOKENS = 24
"""Of plain text, as a prompt."""
ASKED_TOKENS = 96
"""Of a conversation, the last ones before its answer."""
TEXTS = 64
"""Among which neighbours are looked for."""
NEAREST = 3
SHOWN = 240
"""Letters of a text that are kept."""


@torch.no_grad()
def take_samples(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    count: int,
    pooling: str = AUTO,
) -> dict[str, Any]:
    """What both make of `count` of the held-out `rows`; `missing` says why where this kind of model gives none.

    Args:
        student: a model.
        teacher: its teacher.
        tokenizer: of both.
        rows: held-out rows, tokenized.
        count: of texts to show; 0 keeps none.
        pooling: how a sentence encoder's texts become vectors.
    """
    if count == 0:
        return {"missing": "recipe.evaluation.samples is 0: no text was to be kept"}
    answers = bool(student.config.is_encoder_decoder) and has_completions(rows)
    if reads_blocks(student) or answers:
        return {"kind": "continuations", "rows": _continuations(student, teacher, tokenizer, rows, count)}
    if resolve(student).head is None and not student.config.is_encoder_decoder:
        return {"kind": "neighbours", **_neighbours(student, teacher, tokenizer, rows, count, pooling)}
    return {"missing": f"{type(student).__name__} neither writes on nor gives embeddings of texts"}


def _continuations(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, count: int
) -> list[dict[str, str]]:
    asked, limit = has_completions(rows), token_limit(student)
    longest = ASKED_TOKENS if limit is None else min(ASKED_TOKENS, limit // 2)
    chosen = [rows[place] for place in _spread(len(rows), count)]
    apart = bool(student.config.is_encoder_decoder)  # prompt and response are two sides
    if asked:  # a row that was cut may have lost its answer
        chosen = [row for row in chosen if any(label != IGNORE_INDEX for label in row["labels"])]
    prompts = [
        list(row["input_ids"])[:longest]
        if apart
        else (prompt_of(row) if asked else _beginning(row["input_ids"]))[-longest:]
        for row in chosen
    ]
    known = [(row, prompt) for row, prompt in zip(chosen, prompts, strict=True) if prompt]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    written = [
        generate(model, [prompt for _, prompt in known], WRITTEN, stop_tokens(model, tokenizer), int(padding or 0),
                 seed=0, batch_size=max(1, len(known)))
        for model in (teacher, student)
    ]  # fmt: skip
    return [
        {
            "prompt": _words(tokenizer, prompt),
            "teacher": _words(tokenizer, theirs),
            "student": _words(tokenizer, ours),
            **({"reference": _answer(row, tokenizer, apart)[:SHOWN]} if asked else {}),
        }
        for (row, prompt), theirs, ours in zip(known, *written, strict=True)
    ]


def _answer(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, apart: bool) -> str:
    return _words(tokenizer, row["labels"]) if apart else reference_of(row, tokenizer)


def _beginning(ids: Sequence[int]) -> list[int]:
    """The first tokens of a text, of which something is left to write."""
    return list(ids[: min(PROMPT_TOKENS, max(1, len(ids) // 2))])


def _neighbours(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    count: int,
    pooling: str,
) -> dict[str, Any]:
    few = rows.select(_spread(len(rows), TEXTS))
    if len(few) < NEAREST + 2:
        return {"missing": f"{len(few)} held-out texts are too few to have neighbours"}
    texts = [_words(tokenizer, ids) for ids in few["input_ids"]]
    encoder, collate = encoder_of(origin_of(teacher), pooling), collator(tokenizer, student)
    batches = [
        collate([few[place] for place in range(start, min(start + 16, len(few)))]) for start in range(0, len(few), 16)
    ]
    nearest, alike = [], []
    for model in (teacher, student):
        vectors = []
        with in_eval(model), without_cache(model):
            for batch in batches:
                inputs = model_inputs(batch, model.device)
                vectors.append(encoder(model(**inputs)[0].float(), encoder_tokens(inputs)).cpu())
        cosines = _cosines(torch.cat(vectors))
        alike.append(cosines)
        nearest.append(cosines.topk(NEAREST, dim=-1).indices.tolist())
    same = [len({*theirs} & {*ours}) / NEAREST for theirs, ours in zip(*nearest, strict=True)]
    return {
        "texts": len(texts),
        "nearest": NEAREST,
        "kept": sum(same) / len(same),
        "rows": [
            {
                "text": texts[place],
                **{
                    side: [{"text": texts[other], "cosine": float(alike[number][place, other])} for other in found]
                    for number, side in enumerate(("teacher", "student"))
                    for found in [nearest[number][place]]
                },
            }
            for place in _spread(len(texts), count)
        ],
    }


def _cosines(vectors: Tensor) -> Tensor:
    """Of each text with each other one, (texts, texts); with itself below all."""
    units = torch.nn.functional.normalize(vectors, dim=-1)
    return (units @ units.T).fill_diagonal_(-2.0)


def _spread(length: int, count: int) -> list[int]:
    """Places of at most `count` things, evenly among `length`."""
    few = min(length, count)
    return [number * length // few for number in range(few)]


def _words(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = " ".join(str(tokenizer.decode(list(ids), skip_special_tokens=True)).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
