"""Station 8: rows of instructions with references, as prompts that a model can answer.

The defaults are the protocol of MiniLLM (Gu et al., 2024): five seeds, sampled at temperature 1 from the whole
distribution, prompts of 256 tokens at most and as many for the answer.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset, DatasetDict, LargeList, List
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.limits import token_limit
from makd.data import check_strings, load_splits, reads_blocks, validation_split
from makd.data.guess import STRINGS
from makd.data.marks import find_marks
from makd.errors import DataError, SettingError
from makd.generation import Sampling
from makd.kinds import checked

logger = logging.getLogger(__name__)

AUTO, NONE = "auto", "none"
"""Templates: the tokenizer's own for chats, and none."""
PROMPT = "{prompt}"
"""Where the prompt stands in a template that is written out."""
PROMPTS = (("prompt",), ("instruction", "input"), ("instruction", "context"), ("instruction",), ("question",))
"""Columns that make a prompt, by the names that they usually have; the first that are all there."""
REFERENCES = ("output", "response", "completion", "answer")
"""The same of references."""


@dataclass(frozen=True, kw_only=True)
@checked("instructions")
class InstructionsConfig:
    """Instructions that models answer, and how they do."""

    path: str
    """A hub id, a folder or a file, as `data.path`."""
    name: str | None = None
    """Configuration of a hub data set."""
    split: str | None = None
    """None takes `test`, else `validation`, else the only one."""
    prompt_columns: tuple[str, ...] | None = None
    """What a model is asked; several columns are joined, an empty line between, those that are blank left out. None
    takes the first of `PROMPTS` that are there."""
    reference_column: str | None = None
    """A text, or a list of texts of which the best counts. None takes the first of `REFERENCES` that is there."""
    template: str = NONE
    """`none` gives the prompt as it is, after what the tokenizer puts before a text; `auto` as a user's message in the
    tokenizer's chat template; or what stands around a prompt up to the answer, with {prompt} in it once."""
    rows: int | None = None
    """At most so many rows, the first ones; None takes all."""
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    """Every row is answered once with each."""
    temperature: float = 1.0
    """0 takes the most likely token, with one seed."""
    top_p: float = 1.0
    """Only the likeliest tokens that have this much of the probability together; 1 is all of them."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0 is all of them."""
    max_prompt_tokens: int = 256
    max_answer_tokens: int = 256
    longer: Literal["refuse", "cut", "drop"] = "refuse"
    """What is done about a prompt of more than `max_prompt_tokens`: `cut` keeps its first tokens, as MiniLLM does."""
    batch_size: int = 16
    """Prompts that are answered at once."""

    def __post_init__(self) -> None:
        for name in ("prompt_columns", "seeds"):
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise SettingError(f"instructions.{name} is a list of at least one, all different; got {list(values)}.")
        for name in ("rows", "max_prompt_tokens", "max_answer_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"instructions.{name} is at least 1; got {value}.")
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise SettingError(
                "instructions.temperature is at least 0, top_p in (0, 1], top_k at least 0; got "
                f"{self.temperature}, {self.top_p} and {self.top_k}."
            )
        if not all(0 <= seed < 2**32 for seed in self.seeds):
            raise SettingError(f"instructions.seeds are at least 0 and less than 2^32; got {list(self.seeds)}.")
        if self.temperature == 0 and len(self.seeds) > 1:
            raise SettingError(
                f"instructions.temperature 0 takes the most likely token whatever the seed, and there are "
                f"{len(self.seeds)} seeds. Give one (`instructions.seeds: [0]`)."
            )
        if self.template not in (AUTO, NONE) and self.template.count(PROMPT) != 1:
            raise SettingError(
                f"instructions.template is {AUTO}, {NONE}, or a text with {PROMPT} in it once; got {self.template!r}."
            )
        if self.template != NONE and self.longer == "cut":
            raise SettingError(
                "instructions.longer 'cut' would cut off the end of a template, where the answer begins. Take 'drop', "
                "or raise instructions.max_prompt_tokens."
            )

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen."""
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, max_new_tokens=self.max_answer_tokens
        )


@dataclass(frozen=True)
class Instructions:
    """Rows as they were read."""

    config: InstructionsConfig
    prompts: list[str]
    references: list[list[str]]
    """Of each prompt, at least one."""


@dataclass(frozen=True)
class Prompts:
    """Rows as a model reads them."""

    rows: Instructions
    """Those that are answered."""
    ids: list[list[int]]
    cut: int
    """How many prompts lost their end."""
    dropped: int
    """How many rows were left out."""


def load_instructions(config: InstructionsConfig) -> Instructions:
    """The rows that `config` names.

    Raises:
        DataError: there is nothing at `path`, a split or column is missing or holds something else, or a row has no
            prompt or no reference.
    """
    splits = load_splits(config.path, config.name)
    rows = splits[_choose_split(splits, config)]
    rows = rows if config.rows is None else rows.select(range(min(config.rows, len(rows))))
    if len(rows) == 0:
        raise DataError(f"{config.path} holds no rows to answer.")
    asked, reference = _find_columns(rows, config)
    columns = [rows[name] for name in asked]
    prompts = ["\n\n".join(part for part in parts if part and part.strip()) for parts in zip(*columns, strict=True)]
    references = [_as_list(value) for value in rows[reference]]
    for what, found in (("prompt", prompts), ("reference", references)):
        empty = [place for place, value in enumerate(found) if not value]
        if empty:
            raise DataError(
                f"{len(empty)} of {len(rows)} rows of {config.path} have no {what}, the first is row {empty[0]}: an "
                "answer to it could not be scored. Take them out."
            )
    return Instructions(config, prompts, references)


def encode_prompts(instructions: Instructions, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Prompts:
    """The prompts as `model` reads them.

    Raises:
        SettingError: the model writes no text; the tokenizer has no chat template and one is asked for; prompt and
            answer are beyond the model's positions.
        DataError: a prompt is too long and is to be refused, or all of them were dropped.
    """
    config, limit = instructions.config, token_limit(model)
    apart = bool(model.config.is_encoder_decoder)
    if not (reads_blocks(model) or (apart and model.can_generate())):
        raise SettingError(
            f"Instructions are answered by language models; {type(model).__name__} is none. Give the model with its "
            "head (recipe.head causal_lm, or seq2seq_lm)."
        )
    sides = (config.max_prompt_tokens, config.max_answer_tokens)
    together = max(sides) if apart else sum(sides)
    if limit is not None and together > limit:
        raise SettingError(
            f"instructions.max_prompt_tokens {'and' if apart else '+'} max_answer_tokens are "
            f"{f'{sides[0]} and {sides[1]}' if apart else together}, but {type(model).__name__} has "
            f"positions for {limit}{' on each side' if apart else ''}. Lower them."
        )
    if apart:
        ids = _whole_texts(instructions.prompts, tokenizer, config)
    else:
        ids = prompt_ids(instructions.prompts, tokenizer, config.template)
    longer = [place for place, row in enumerate(ids) if len(row) > config.max_prompt_tokens]
    if longer and config.longer == "refuse":
        raise DataError(
            f"{len(longer)} of {len(ids)} prompts of {config.path} have more than instructions.max_prompt_tokens = "
            f"{config.max_prompt_tokens} tokens; the longest has {max(map(len, ids))}. Raise it, or say with "
            "instructions.longer to 'drop' them or to 'cut' off their ends."
        )
    if config.longer == "cut":
        # what ends an encoder's text stays
        end = len(find_marks(tokenizer).after) if apart else 0
        most = config.max_prompt_tokens
        cut = [row if len(row) <= most else row[: most - end] + row[len(row) - end :] for row in ids]
        return Prompts(instructions, cut, cut=len(longer), dropped=0)
    kept = [place for place in range(len(ids)) if place not in set(longer)]
    if not kept:
        raise DataError(
            f"Every prompt of {config.path} is longer than {config.max_prompt_tokens} tokens: none is left."
        )
    rows = Instructions(
        config,
        [instructions.prompts[place] for place in kept],
        [instructions.references[place] for place in kept],
    )
    return Prompts(rows, [ids[place] for place in kept], cut=0, dropped=len(longer))


def prompt_ids(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, template: str) -> list[list[int]]:
    """Token ids of prompts up to where an answer begins.

    Raises:
        SettingError: `template` is `auto` and the tokenizer has none.
    """
    if template == AUTO:
        if not tokenizer.chat_template:
            raise SettingError(
                "instructions.template is 'auto', and the tokenizer has no chat template. Give prompts as they are "
                "(`instructions.template: none`), what stands around them, or a tokenizer that has one."
            )
        messages: Any = [[{"role": "user", "content": prompt}] for prompt in prompts]
        found: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return [list(row) for row in found]
    if template == NONE and tokenizer.chat_template:
        logger.info("prompts are asked as they are; instructions.template auto asks through the chat template")
    before = list(find_marks(tokenizer).before)
    texts = [prompt if template == NONE else template.replace(PROMPT, prompt) for prompt in prompts]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [row if before and row[: len(before)] == before else before + row for row in encoded]


def _whole_texts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: InstructionsConfig
) -> list[list[int]]:
    """Token ids of prompts as an encoder reads them: whole texts, with what the tokenizer puts around each."""
    if config.template == AUTO:
        raise SettingError(
            "instructions.template is 'auto', a chat's, and an encoder-decoder reads a prompt as it is. Take 'none', "
            "or what stands around a prompt."
        )
    texts = [prompt if config.template == NONE else config.template.replace(PROMPT, prompt) for prompt in prompts]
    return [list(row) for row in tokenizer(texts, verbose=False)["input_ids"]]


def _choose_split(splits: DatasetDict, config: InstructionsConfig) -> str:
    only = next(iter(splits)) if len(splits) == 1 else None
    name = config.split or ("test" if "test" in splits else validation_split(splits) or only)
    if name is None or name not in splits:
        told = f"no split {config.split!r}" if config.split else "neither `test` nor `validation`"
        raise DataError(f"{config.path} has {told}; it has {', '.join(splits)}. Name one with instructions.split.")
    return name


def _find_columns(rows: Dataset, config: InstructionsConfig) -> tuple[tuple[str, ...], str]:
    """Columns of the prompts and of the references, which are there and hold text, or lists of texts for references."""
    there = rows.column_names
    asked, reference = config.prompt_columns, config.reference_column
    if asked is None:
        asked = next((names for names in PROMPTS if set(names) <= set(there)), PROMPTS[0])
    if reference is None:
        reference = next((name for name in REFERENCES if name in there and name not in asked), REFERENCES[0])
    settings = {name: "prompt_columns" for name in asked} | {reference: "reference_column"}
    for name, setting in settings.items():
        if name not in there:
            raise DataError(
                f"{config.path} has no column {name!r} (instructions.{setting}); it has {', '.join(there)}."
            )
    if config.prompt_columns is None or config.reference_column is None:
        told = ", ".join(map(repr, asked))
        logger.info("%s: prompts are read from %s, references from %r", config.path, told, reference)
    kind: Any = rows.features[reference]
    lists = isinstance(kind, List | LargeList) and getattr(kind.feature, "dtype", None) in STRINGS
    check_strings(rows, [*asked, *([] if lists else [reference])], config.path)
    return asked, reference


def _as_list(value: Any) -> list[str]:
    """References that say something."""
    texts = [value] if isinstance(value, str) else value or []
    return [text for text in texts if text and text.strip()]
