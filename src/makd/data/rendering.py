"""Station 2, continued: from a conversation to token ids, and which of them the model is to learn.

A chat template may mark itself what the assistant says ({% generation %}). Where it does not, the conversation is
rendered up to each answer, and with it: what is new is the answer.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from makd.data.conversations import Message
from makd.data.marks import find_marks
from makd.data.settings import AUTO, NONE, PROMPT, Rendering
from makd.errors import DataError

logger = logging.getLogger(__name__)

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens, up to the last one that is learned."""

    ids: list[int]
    learned: list[bool]
    """True at tokens of answers, what ends them included."""


Conversation = tuple[Sequence[Message], int]
"""Messages, one of them an answer to learn, and how many of the first ones are never learned."""
Encoder = Callable[[Sequence[Conversation]], list[Encoded]]


@dataclass(frozen=True)
class _Rendered:
    """A conversation as text."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """Where in the text the learned answers begin and end."""


def make_encoder(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> Encoder:
    """How `tokenizer` reads conversations.

    Raises:
        DataError: it has no chat template, and `rendering` asks for it; or it does not say where in a text its tokens
            stand.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens stand, so that answers cannot be "
            "found. Give a fast tokenizer (tokenizer.json), or the conversations as plain text, in one column."
        )
    if rendering.template != AUTO:
        return _Written(tokenizer, PROMPT if rendering.template == NONE else rendering.template)
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            "The data are prompts with responses, or conversations, and the tokenizer has no chat template. Say with "
            "data.template what stands before a response, such as '### Instruction:\\n{prompt}\\n\\n### Response:\\n'; "
            f"or {NONE}, if the prompts end with it."
        ) from error
    if "strftime_now" in template:
        logger.warning(
            "The tokenizer's chat template writes the date of today: the same data are other tokens tomorrow, and a "
            "run that was stopped cannot be resumed then. Give a template without it."
        )
    return _by_chat_template(tokenizer, template, rendering.system)


def _by_chat_template(tokenizer: PreTrainedTokenizerBase, template: str, system: str | None) -> Encoder:
    kind = _Marked if _GENERATION.search(template) else _Compared
    return kind(tokenizer, system)


def answer_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token by which the tokenizer's chat template ends an answer, if it ends answers by one of its own.

    Two answers are rendered: what both end with, and is no part of a text, is the template's.
    """
    if not tokenizer.chat_template or not tokenizer.is_fast:
        return []
    asked: Message = {"role": "user", "content": "one"}
    try:
        read = _by_chat_template(tokenizer, tokenizer.get_chat_template(), None)
        pair = read([([asked, {"role": "assistant", "content": text}], 0) for text in ("two", "three four")])
    except (DataError, ValueError):  # such a template ends nothing that makd reads
        return []
    last = {one.ids[-1] for one in pair if one.ids}
    own = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return [*last] if len(last) == 1 and last <= own else []


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **settings: Any) -> Any:
    """The chat template's text; or its tokens, with settings that ask for them.

    Raises:
        DataError: the template refuses the messages.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), **settings)
    except TemplateError as error:
        raise DataError(
            f"The tokenizer's chat template refuses a conversation of the roles "
            f"{', '.join(message['role'] for message in messages)}: {error}. Drop or join what it does not take."
        ) from error


class _Chat:
    """What both ways of finding answers by a chat template share."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
        self.tokenizer = tokenizer
        self.system: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def complete(self, messages: Sequence[Message], given: int) -> tuple[list[Message], int]:
        """The messages up to the last answer, with the system's where they have none."""
        last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
        first = [] if messages[0]["role"] == "system" else self.system
        return [*first, *messages[: last + 1]], given + len(first)


class _Marked(_Chat):
    """By the template's own mask."""

    def __call__(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        return [self._encode(*self.complete(messages, given)) for messages, given in conversations]

    def _encode(self, messages: list[Message], given: int) -> Encoded:
        found = render_chat(
            self.tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, learned = list(found["input_ids"]), [bool(one) for one in found["assistant_masks"]]
        # answers that were given are the first ones that the template marked
        begins = [place for place, one in enumerate(learned) if one and not (place and learned[place - 1])]
        unlearned = sum(message["role"] == "assistant" for message in messages[:given])
        if len(begins) != sum(message["role"] == "assistant" for message in messages):
            raise DataError(
                f"The tokenizer's chat template marks {len(begins)} answers in a conversation of the roles "
                f"{', '.join(message['role'] for message in messages)}. Give one that marks each answer "
                "({% generation %}), or none."
            )
        start = begins[unlearned]
        return _up_to_last(ids, [one and place >= start for place, one in enumerate(learned)])


class _Compared(_Chat):
    """By what is new in the text when an answer joins the conversation."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None) -> None:
        super().__init__(tokenizer, system)
        self.ends = tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
        self.tail = self._find_tail()

    def __call__(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        rendered = [self._render(*self.complete(messages, given)) for messages, given in conversations]
        return [_up_to_last(*found) for found in _tokens(self.tokenizer, rendered)]

    def _render(self, messages: list[Message], given: int) -> _Rendered:
        text, answers = self._without_tail(messages), []
        for place, message in enumerate(messages):
            if message["role"] != "assistant" or place < given:
                continue
            before: str = render_chat(self.tokenizer, messages[:place], tokenize=False, add_generation_prompt=True)
            after = self._without_tail(messages[: place + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    "The tokenizer's chat template renders the beginning of a conversation otherwise once more follows "
                    f"(message {place} of {len(messages)}; templates that drop earlier thinking do so), so that "
                    "answers cannot be found in its text. Give a template that marks them ({% generation %}), or "
                    "conversations of one answer each."
                )
            answers.append((len(before), len(before) + len(self._ended(after[len(before) :]))))
        return _Rendered(text, tuple(answers))

    def _without_tail(self, messages: Sequence[Message]) -> str:
        text: str = render_chat(self.tokenizer, messages, tokenize=False)
        return text.removesuffix(self.tail)

    def _find_tail(self) -> str:
        """What the template appends once, after a whole conversation: special tokens, behind that of the last answer.

        Phi-3's appends the end of a text, where it asks for no answer. Nobody generates that, and where the
        conversation goes on it is not there.
        """
        turns: list[Message] = [{"role": role, "content": "one"} for role in ("user", "assistant", "user")]
        try:
            short, long = (str(render_chat(self.tokenizer, turns[:count], tokenize=False)) for count in (2, 3))
        except DataError:  # of such a template as much is known as it renders
            return ""
        if not self.ends or long.startswith(short):
            return ""
        token = re.compile("|".join(re.escape(end) for end in sorted(self.ends, key=len, reverse=True)))
        for end in token.finditer(short):
            body, tail = short[: end.start()], short[end.start() :]
            ended = body.rstrip().endswith(self.ends)  # what an answer ends with is no tail
            if ended and long.startswith(body) and long.endswith(tail) and not token.sub("", tail).strip():
                return tail
        return ""

    def _ended(self, answer: str) -> str:
        """An answer without the blanks that follow the token which ends it: nobody generates those."""
        short = answer.rstrip()
        return short if short.endswith(self.ends) else answer


class _Written:
    """By a template that is written out: what stands before the response; after it the text ends."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        marks, end = find_marks(tokenizer), tokenizer.eos_token_id
        self.before, self.end = list(marks.before), list(marks.after) if end is None else [end]

    def __call__(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        return [
            Encoded([*first, *ids, *self.end], [*(False for _ in first), *learned, *(True for _ in self.end)])
            for ids, learned in _tokens(self.tokenizer, [self._render(messages) for messages, _ in conversations])
            for first in [[] if self.before and ids[: len(self.before)] == self.before else self.before]
        ]

    def _render(self, messages: Sequence[Message]) -> _Rendered:
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise DataError(
                "A template that is written out (data.template) takes one prompt and one response; a conversation has "
                f"the roles {', '.join(message['role'] for message in messages)}. Take data.template {AUTO}, with a "
                "tokenizer that has a chat template."
            )
        prompt = self.template.replace(PROMPT, messages[0]["content"])
        text = prompt + messages[1]["content"]
        return _Rendered(text, ((len(prompt), len(text)),))


def _tokens(
    tokenizer: PreTrainedTokenizerBase, rendered: Sequence[_Rendered]
) -> Iterator[tuple[list[int], list[bool]]]:
    """Ids of each text, and which of them hold something of an answer."""
    if not rendered:
        return
    texts = [one.text for one in rendered]
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for one, ids, places in zip(rendered, found["input_ids"], found["offset_mapping"], strict=True):
        yield list(ids), [any(start < last and first < end for start, end in one.answers) for first, last in places]


def _up_to_last(ids: list[int], learned: list[bool]) -> Encoded:
    """Without what follows the last learned token, which nothing is learned from."""
    end = max((place + 1 for place, one in enumerate(learned) if one), default=0)
    return Encoded(ids[:end], learned[:end])
