"""Station 2, continued: a prompt and its response as an encoder-decoder reads them, a side each.

The prompt is the encoder's text, as the tokenizer makes it; the response is what the decoder writes, in `labels` of a
length of their own. The decoder reads them one place later, as the model's own code shifts them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from makd.anatomy.tokens import IGNORE_INDEX
from makd.data.completions import CUT, WHOLE, ConversationRow
from makd.data.conversations import Message
from makd.data.rendering import Conversation
from makd.data.settings import AUTO, NONE, PROMPT, Rendering
from makd.errors import DataError


def check_writes(model: PreTrainedModel) -> None:
    """Refuse an encoder-decoder that writes no text.

    Raises:
        DataError: `model` cannot generate.
    """
    if not model.can_generate():
        raise DataError(
            f"The data are prompts with responses, and {type(model).__name__} writes no text. Load the model under its "
            "head (recipe.head seq2seq_lm)."
        )


def decoder_reads(model: PreTrainedModel, labels: Int[Tensor, "rows tokens"]) -> Int[Tensor, "rows tokens"]:
    """What a decoder reads when it is to predict `labels`: these, a place later.

    As the model's own method says; without one, as the code of all of them does it: the token that a decoder starts
    with, then the labels but for the last. Padding takes the place of -100.

    Raises:
        DataError: the model has no such method, and its config does not name these tokens.
    """
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        made: Tensor = prepare(labels=labels)
        return made
    start, padding = model.config.decoder_start_token_id, model.config.pad_token_id
    if start is None or padding is None:
        raise DataError(
            f"The config of the {type(model).__name__} does not say what its decoder starts with, or what padding is. "
            "Set decoder_start_token_id and pad_token_id."
        )
    shifted = torch.roll(labels, 1, dims=1)
    shifted[:, 0] = start
    return shifted.masked_fill(shifted == IGNORE_INDEX, padding)


class TwoSides:
    """How `tokenizer` reads prompts with responses for two stacks; each side is cut at `max_length` tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering, max_length: int) -> None:
        """Nothing is read yet.

        Args:
            tokenizer: of both sides; one with a language or a vocabulary for each is told which by its own settings.
            rendering: its template says what stands around a prompt; `auto` and `none` leave it as it is.
            max_length: tokens of a side, at most.

        Raises:
            DataError: there is a system message, which a template that is written out can hold.
        """
        if rendering.system is not None:
            raise DataError(
                "data.system is a message for a chat template, and an encoder-decoder reads a prompt as it is. Write "
                "it into data.template, with {prompt} where the prompt stands."
            )
        self.tokenizer, self.max_length = tokenizer, max_length
        self.template = PROMPT if rendering.template in (AUTO, NONE) else rendering.template

    def __call__(self, conversations: Sequence[Conversation]) -> list[ConversationRow]:
        """A row of each: `input_ids` of the prompt, `labels` of the response."""
        if not conversations:
            return []
        pairs = [_pair(messages) for messages, _ in conversations]
        settings = {"truncation": True, "max_length": self.max_length}
        asked = self.tokenizer([self.template.replace(PROMPT, prompt) for prompt, _ in pairs], **settings)
        answers = self.tokenizer(text_target=[response for _, response in pairs], **settings)
        return [
            ConversationRow(
                input_ids=list(ids),
                labels=list(labels),
                fate=CUT if self._is_cut(asked, place) or self._is_cut(answers, place) else WHOLE,
                learned=len(labels),
                tokens=len(ids) + len(labels),
            )
            for place, (ids, labels) in enumerate(zip(asked["input_ids"], answers["input_ids"], strict=True))
        ]

    def _is_cut(self, encoded: BatchEncoding, place: int) -> bool:
        """Whether something of a text is left out; a slow tokenizer does not say it of one that just fits."""
        if encoded.encodings is not None:
            return bool(encoded.encodings[place].overflowing)
        return len(encoded["input_ids"][place]) == self.max_length


def _pair(messages: Sequence[Message]) -> tuple[str, str]:
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"]:
        raise DataError(
            f"An encoder-decoder reads one prompt and writes one response; a conversation has the roles "
            f"{', '.join(roles)}. Give rows of one prompt and one response, or a causal language model."
        )
    return messages[0]["content"], messages[1]["content"]
