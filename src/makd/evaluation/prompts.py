"""Station 8: instructions as the token ids that a model is asked with."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.limits import token_limit
from makd.data import reads_blocks
from makd.data.conversations import Message
from makd.data.marks import find_marks
from makd.data.rendering import render_chat
from makd.data.settings import AUTO, NONE, PROMPT, DataConfig
from makd.data.unknown import Known, KnownTokens, check_known
from makd.errors import DataError, SettingError
from makd.evaluation.instructions import Instructions, InstructionsConfig

logger = logging.getLogger(__name__)


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


def encode_prompts(instructions: Instructions, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Prompts:
    """The prompts as `model` reads them.

    Raises:
        SettingError: the model writes no text; the tokenizer has no chat template and one is asked for; prompt and
            answer are beyond the model's positions.
        DataError: a prompt is too long and is to be refused, or all of them were dropped; or the tokenizer knows nearly
            nothing of them.
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
    ids = _whole_texts(instructions.prompts, tokenizer, config) if apart else _prompt_ids(instructions, tokenizer)
    check_known(Known.sum(map(KnownTokens(tokenizer).count, ids)), tokenizer, "the prompts")
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
    return Prompts(instructions.select(kept), [ids[place] for place in kept], cut=0, dropped=len(longer))


def warn_asked_otherwise(asked: InstructionsConfig, taught: DataConfig, model: PreTrainedModel) -> None:
    """Warn where `model` is asked in another way than the conversations that it learned from put it.

    Args:
        asked: the instructions.
        taught: what the model learned from: conversations.
        model: an encoder-decoder reads a prompt as it is where its template is `auto`.
    """
    template = NONE if model.config.is_encoder_decoder and taught.template == AUTO else taught.template
    other = {
        name: (mine, own)
        for name, mine, own in (("template", asked.template, template), ("system", asked.system, taught.system))
        if mine != own
    }
    for name, (mine, own) in other.items():
        logger.warning(
            "instructions.%s is %r, and data.%s is %r: they are asked otherwise than the data are put, and what a "
            "student that learned from these answers may not be what it could. Give instructions.%s %s, unless that is "
            "what is to be measured",
            name, mine, name, own, name, "null" if own is None else own,
        )  # fmt: skip


def _prompt_ids(instructions: Instructions, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of prompts up to where an answer begins.

    Raises:
        SettingError: the template is `auto` and the tokenizer has none.
        DataError: the chat template refuses a conversation.
    """
    template = instructions.config.template
    if template == AUTO:
        if not tokenizer.chat_template:
            raise SettingError(
                "instructions.template is 'auto', and the tokenizer has no chat template. Give prompts as they are "
                "(`instructions.template: none`), what stands around them, or a tokenizer that has one."
            )
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        system = instructions.config.system
        first: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        return [
            list(
                render_chat(tokenizer, messages if messages[0]["role"] == "system" else [*first, *messages], **settings)
            )
            for messages in instructions.messages
        ]
    if template == NONE and tokenizer.chat_template:
        logger.info("prompts are asked as they are; instructions.template auto asks through the chat template")
    before = list(find_marks(tokenizer).before)
    texts = [prompt if template == NONE else template.replace(PROMPT, prompt) for prompt in instructions.prompts]
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
