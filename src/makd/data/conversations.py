"""Station 2: from columns of any layout to conversations, one form for prompts with responses and for chats.

After this module a row has `messages`, a list of a role and a content each; `given`, how many of the first ones are
never learned; and `references`, the texts that answer the last message before them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Json, LargeList, List, Value

from makd.data.guess import STRINGS
from makd.data.settings import DataConfig
from makd.errors import DataError
from makd.kinds import shown
from makd.mapped import map_rows

logger = logging.getLogger(__name__)

Message = dict[str, str]
MESSAGES = "messages"
"""The column of conversations, after this module."""
FEATURES = Features(
    {
        MESSAGES: List({"role": Value("string"), "content": Value("string")}),
        "given": Value("int32"),
        "references": List(Value("string")),
    }
)
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
"""Roles, and what they are called elsewhere."""
CHATS = ("messages", "conversations")
"""Columns that hold conversations, by the names that they usually have."""
PAIRS = (
    (("prompt",), (), ("completion", "response")),
    (("instruction",), ("input", "context"), ("response", "output")),
)
"""Columns of prompts with responses: what has to be there, what may be there besides, and which of these answers."""
UNREAD = ("system", "system_prompt", "tools", "functions")
"""Columns that people put beside those of conversations."""
CARRIED = ("tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking")
"""What a message may hold besides, and what would be lost without it."""


@dataclass(frozen=True)
class Columns:
    """Where the rows of some data hold conversations."""

    prompts: tuple[str, ...]
    """Joined; or one column of lists of messages."""
    response: str | None
    """None: the prompts' one column holds whole conversations."""


def find_columns(rows: Dataset, config: DataConfig) -> Columns | None:
    """Where conversations are, as `config` says or by the names of columns; None for rows of plain text.

    Raises:
        DataError: a column that `config` names is not there.
    """
    if config.messages_column is not None:
        found = Columns((config.messages_column,), None)
    elif config.prompt_columns is not None:
        found = Columns(config.prompt_columns, config.response_column)
    elif config.text_columns is not None or "text" in rows.column_names:
        return None
    else:
        guessed = _guess(rows)
        if guessed is None:
            return None
        found = guessed
        names = ", ".join(map(repr, found.prompts))
        if found.response is None:
            logger.info("%s: conversations are read from the column %s", config.place, names)
        else:
            logger.info("%s: prompts are read from %s, responses from %r", config.place, names, found.response)
    missing = [name for name in (*found.prompts, found.response) if name and name not in rows.column_names]
    if missing:
        raise DataError(
            f"{config.place} has no column {', '.join(map(repr, missing))}; it has {', '.join(rows.column_names)}."
        )
    return found


def find_chats(rows: Dataset) -> str | None:
    """The column that holds whole conversations, by its name and what is in it; None if there is none."""
    return next((name for name in CHATS if name in rows.column_names and _is_messages(rows.features[name])), None)


def are_messages(rows: Dataset, columns: Columns) -> bool:
    """Whether all that `columns` name are lists of messages: whole conversations, or prompts and their completions."""
    return columns.response is None or all(
        _is_messages(rows.features[name]) for name in (*columns.prompts, columns.response)
    )


def _guess(rows: Dataset) -> Columns | None:
    chats = find_chats(rows)
    if chats is not None:
        return Columns((chats,), None)
    for needed, besides, answers in PAIRS:
        if all(name in rows.column_names for name in needed):
            response = next((name for name in answers if name in rows.column_names), None)
            if response is not None:
                return Columns((*needed, *(name for name in besides if name in rows.column_names)), response)
    return None


def as_conversations(rows: Dataset, columns: Columns, where: str) -> Dataset:
    """The rows of the data `where` as conversations.

    Raises:
        DataError: a column holds something else, or roles are unknown or out of order.
    """
    read: Callable[[Mapping[str, Any], int], dict[str, Any]]
    if columns.response is None:
        _check_kind(rows, columns.prompts[0], _is_messages, "lists of messages", where)
        read = _Chats(columns.prompts[0], where)
        beside = [name for name in UNREAD if name in rows.column_names and any(rows[name])]
        if beside:
            logger.warning(
                "%s: column %s stands beside the conversations and is not read. Give it as a message of them",
                where, ", ".join(beside),
            )  # fmt: skip
    elif are_messages(rows, columns):
        if len(columns.prompts) > 1:
            raise DataError(f"{where}: prompts that are lists of messages stand in one column; got {columns.prompts}.")
        read = _ChatPairs(columns.prompts[0], columns.response, where)
    else:
        for name in columns.prompts:
            _check_kind(rows, name, _is_text, "text", where)
        _check_kind(rows, columns.response, _is_answer, "text, or lists of texts", where)
        read = _Pairs(columns.prompts, columns.response)
    found = map_rows(rows, read, with_indices=True, remove_columns=rows.column_names, features=FEATURES)
    if len(found) == 0:
        raise DataError(f"{where} has no rows.")
    return found


@dataclass(frozen=True)
class _Pairs:
    prompts: tuple[str, ...]
    response: str

    def __call__(self, row: Mapping[str, Any], _number: int) -> dict[str, Any]:
        parts = [row[name] for name in self.prompts]
        answers = row[self.response]
        answers = [answers] if answers is None or isinstance(answers, str) else list(answers)
        answers = [answer or "" for answer in answers]
        messages = [
            {"role": "user", "content": "\n\n".join(part for part in parts if part and part.strip())},
            {"role": "assistant", "content": answers[0] if answers else ""},
        ]
        return {MESSAGES: messages, "given": 1, "references": answers}


@dataclass(frozen=True)
class _Chats:
    column: str
    where: str

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        messages = read_messages(row[self.column] or [], f"{self.where}, row {number}")
        return {MESSAGES: messages, "given": 0, "references": _last_answer(messages)}


@dataclass(frozen=True)
class _ChatPairs:
    prompt: str
    completion: str
    where: str

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        given = len(row[self.prompt] or [])
        both = [*(row[self.prompt] or []), *(row[self.completion] or [])]
        messages = read_messages(both, f"{self.where}, row {number}")
        return {MESSAGES: messages, "given": given, "references": _last_answer(messages[given:])}


def read_messages(messages: Sequence[Mapping[str, Any]], where: str) -> list[Message]:
    """Messages of the roles system, user and assistant, in an order that every chat template takes.

    A system message may stand first; then user and assistant take turns.

    Raises:
        DataError: a role is unknown or out of order, a content is no text, or a message carries more than text.
    """
    read = [_read_message(message, f"{where}, message {number}") for number, message in enumerate(messages)]
    wanted = "user"
    for number, message in enumerate(read):
        role = message["role"]
        if role == "system" and number == 0:
            continue
        if role != wanted:
            raise DataError(
                f"{where}: message {number} is of the role {role!r}, where {wanted!r} is next. A conversation is a "
                "system message, if any, and then user and assistant in turns. Join or drop messages, or drop the row."
            )
        wanted = "assistant" if wanted == "user" else "user"
    return read


def _read_message(message: Mapping[str, Any], where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: a message has a role and a content; got {shown(message)}.")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if role not in ROLES:
        raise DataError(f"{where}: the role is one of {', '.join(ROLES)}; got {shown(role)}.")
    carried = [name for name in CARRIED if message.get(name)]
    if carried:
        raise DataError(
            f"{where} has {', '.join(carried)}, which would be lost: makd reads the content alone. Write it into the "
            "content, as the model writes it, or drop the row."
        )
    if content is not None and not isinstance(content, str):
        raise DataError(f"{where}: the content is text; got {shown(content)}.")
    return {"role": ROLES[role], "content": content or ""}


def _last_answer(messages: Sequence[Message]) -> list[str]:
    return next(([message["content"]] for message in reversed(messages) if message["role"] == "assistant"), [])


def _check_kind(rows: Dataset, name: str, holds: Callable[[Any], bool], wanted: str, where: str) -> None:
    if not holds(rows.features[name]):
        kind = getattr(rows.features[name], "dtype", rows.features[name])
        raise DataError(f"The column {name!r} of {where} holds {shown(kind)}, not {wanted}.")


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in (*STRINGS, "null")


def _is_answer(feature: Any) -> bool:
    return _is_text(feature) or (isinstance(feature, List | LargeList) and _is_text(feature.feature))


def _is_messages(feature: Any) -> bool:
    inside = feature.feature if isinstance(feature, List | LargeList) else None
    if isinstance(inside, Json):  # dicts that do not all hold the same
        return True
    if not isinstance(inside, dict):
        return False
    return {"role", "content"} <= inside.keys() or {"from", "value"} <= inside.keys()
