"""Station 8: rows of instructions with references, of any layout.

The defaults are the protocol of MiniLLM (Gu et al., 2024): five seeds, sampled at temperature 1 from the whole
distribution, prompts of 256 tokens at most and as many for the answer.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset, DatasetDict

from makd.data import load_splits, validation_split
from makd.data.conversations import MESSAGES, Columns, Message, are_messages, as_conversations, find_chats
from makd.data.settings import AUTO, NONE, PROMPT
from makd.errors import DataError, SettingError
from makd.generation import Sampling
from makd.kinds import checked

logger = logging.getLogger(__name__)

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
    takes a column of conversations, whose last answers are the references, or the first of `PROMPTS` that are there.
    One column may hold lists of messages, answered by those of `reference_column`."""
    reference_column: str | None = None
    """A text, or a list of texts of which the best counts. None takes the first of `REFERENCES` that is there."""
    template: str = NONE
    """`none` gives the prompt as it is, after what the tokenizer puts before a text; `auto` as a user's message in the
    tokenizer's chat template; or what stands around a prompt up to the answer, with {prompt} in it once."""
    system: str | None = None
    """With template `auto`: the system message of conversations that have none, as `data.system` is where they are
    learned from."""
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
        self._check_template()

    def _check_template(self) -> None:
        if self.template not in (AUTO, NONE) and self.template.count(PROMPT) != 1:
            raise SettingError(
                f"instructions.template is {AUTO}, {NONE}, or a text with {PROMPT} in it once; got {self.template!r}."
            )
        if self.system is not None and self.template != AUTO:
            raise SettingError(
                f"instructions.system is a message for the tokenizer's chat template; instructions.template is "
                f"{self.template!r}. Give instructions.template {AUTO}, or write it into the template instead."
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
    """Of a conversation what the user said last."""
    messages: list[list[Message]]
    """The same as conversations, up to where the answer is due."""
    references: list[list[str]]
    """Of each prompt, at least one."""

    def select(self, places: Sequence[int]) -> "Instructions":
        """The rows in these places."""
        return Instructions(
            self.config,
            [self.prompts[place] for place in places],
            [self.messages[place] for place in places],
            [self.references[place] for place in places],
        )


def load_instructions(config: InstructionsConfig) -> Instructions:
    """The rows that `config` names.

    Raises:
        DataError: there is nothing at `path`, a split or column is missing or holds something else, or a row has no
            prompt or no reference.
        SettingError: the rows are conversations, and are to be asked past the chat template.
    """
    splits = load_splits(config.path, config.name)
    rows = splits[_choose_split(splits, config)]
    rows = rows if config.rows is None else rows.select(range(min(config.rows, len(rows))))
    if len(rows) == 0:
        raise DataError(f"{config.path} holds no rows to answer.")
    columns = _find_columns(rows, config)
    if are_messages(rows, columns) and config.template != AUTO:
        named = " and ".join(map(repr, filter(None, (*columns.prompts, columns.response))))
        raise SettingError(
            f"{config.path} holds conversations in {named}, which are asked through the tokenizer's chat template: "
            f"give instructions.template {AUTO}. Or name columns of text with instructions.prompt_columns."
        )
    found = _read(rows, columns, config)
    for what, values in (("prompt", found.prompts), ("reference", found.references)):
        empty = [place for place, value in enumerate(values) if not "".join(value).strip()]
        if empty:
            raise DataError(
                f"{len(empty)} of {len(rows)} rows of {config.path} have no {what}, the first is row {empty[0]}: an "
                "answer to it could not be scored. Take them out."
            )
    return found


def _choose_split(splits: DatasetDict, config: InstructionsConfig) -> str:
    only = next(iter(splits)) if len(splits) == 1 else None
    name = config.split or ("test" if "test" in splits else validation_split(splits) or only)
    if name is None or name not in splits:
        told = f"no split {config.split!r}" if config.split else "neither `test` nor `validation`"
        raise DataError(f"{config.path} has {told}; it has {', '.join(splits)}. Name one with instructions.split.")
    return name


def _find_columns(rows: Dataset, config: InstructionsConfig) -> Columns:
    """Where prompts and references are: as `config` says, or by the names of columns.

    Raises:
        DataError: a column is not there.
    """
    if config.prompt_columns is None and config.reference_column is None:
        chats = find_chats(rows)
        if chats is not None:
            logger.info(
                "%s: conversations are read from the column %r; their last answers are the references",
                config.path, chats,
            )  # fmt: skip
            return Columns((chats,), None)
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
    return Columns(asked, reference)


def _read(rows: Dataset, columns: Columns, config: InstructionsConfig) -> Instructions:
    """Each row up to its last answer."""
    prompts, messages, references = [], [], []
    for row in as_conversations(rows, columns, config.path):
        said: list[Message] = row[MESSAGES]
        answers = [place for place, message in enumerate(said) if message["role"] == "assistant"]
        before = said[: answers[-1]] if answers else said
        prompts.append(before[-1]["content"] if before else "")
        messages.append(before)
        references.append([text for text in row["references"] if text.strip()])
    return Instructions(config, prompts, messages, references)
