"""Conversations in a row's cells: lists of messages, or texts in which they are written down."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

from rlaif_ray.documents import parse_json
from rlaif_ray.errors import InputError
from rlaif_ray.types import Message

_ROLES = ("system", "user", "assistant")
_CHAT_ROLES = (*_ROLES, "tool", "function", "developer")  # that messages have; not all of them are read
# ShareGPT's names of them, of messages {from, value}.
_SPEAKERS = dict.fromkeys(("human", "user"), "user") | {"system": "system"}
_SPEAKERS |= dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant")
_TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of a content's parts, as APIs name them
_NOT_READ = ("tool_calls", "reasoning_content", "reasoning", "thinking")  # keys of a message beside its content

_WRITTEN_MESSAGES = re.compile(r"\s*\[?\s*\{\s*['\"](?:role|content)['\"]\s*:")
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data set, and how to speak of it."""

    place: str  # "prompts.jsonl, line 3"
    number: str  # its id where it has none: "prompts-3"
    cells: dict[str, Any]


def read_messages(row: Row, column: str, system: str | None) -> tuple[Message, ...]:
    """The row's conversation, checked, with `system` before it where it has no system message."""
    value = decoded(row.cells.get(column), row.place, column)
    if isinstance(value, str):
        value = _asked(transcript(value)) or [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise InputError(
            f"{row.place}: {column} must be text or a list of messages (got {described(value)}). "
            "Give the text of the prompt, or [{role: user, content: ...}]."
        )
    messages = [read_message(entry, index, row.place, column) for index, entry in enumerate(value)]
    if not messages or not messages[-1].content.strip():
        shown = shorten(repr(row.cells.get(column)))
        raise InputError(f"{row.place}: {column} is empty (got {shown}). Fill it in or remove the row.")
    if messages[-1].role != "user":
        raise InputError(
            f"{row.place}: the last message of {column} must be from the user (got {messages[-1].role}): the policy "
            "answers it. Remove the messages after the user's last."
        )
    if system is not None and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    return tuple(messages)


def read_message(entry: Any, index: int, place: str, column: str) -> Message:
    where = f"{place}: {column}[{index}]"
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be a message {{role, content}} (got {described(entry)}). Write it as one.")
    shared = "from" in entry and "role" not in entry  # ShareGPT's form
    speaker = entry.get("from") if shared else entry.get("role")
    role = _SPEAKERS.get(speaker) if shared and isinstance(speaker, str) else speaker
    if role not in _ROLES:
        known = _SPEAKERS if shared else _ROLES
        raise InputError(
            f"{where}.{'from' if shared else 'role'} must be one of {', '.join(known)} (got {described(speaker)}). "
            f"Correct or remove it."
        )
    if role == "system" and index:
        raise InputError(f"{where}: a system message must be the first (got it as number {index + 1}). Move it.")
    unread = next((key for key in _NOT_READ if entry.get(key)), None)
    if unread is not None:
        raise InputError(
            f"{where}.{unread} is not read (got {described(entry[unread])}): it would be lost. Write into content "
            f"what the model is to see, a thought as its template has it, such as <think>...</think>; or remove it."
        )
    return Message(
        role, _text_of(entry.get("value"), where, "value") if shared else _text_of(entry.get("content"), where)
    )


def _text_of(content: Any, where: str, key: str = "content") -> str:
    """A content's text; of several parts one after the other, a line each."""
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise InputError(f"{where}.{key} must be text (got {described(content)}). Only text prompts are read.")
        return content
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise InputError(
                f"{where}.{key}[{number}] must be text (got {described(kind or part)}). Only text is read: remove "
                "the row, or the part."
            )
        texts.append(text)
    return "\n".join(texts)


def decoded(value: Any, place: str, column: str) -> Any:
    """The messages that are written in a text as JSON, or as Python (what pandas writes into CSV); else `value`.

    Other data may have a "role" too: what has one that no message has is text.

    Raises:
        InputError: they can't be read, though the text begins and ends as they do.
    """
    if not isinstance(value, str) or not _WRITTEN_MESSAGES.match(value) or value.rstrip()[-1] not in "]}":
        return value
    if "role" not in value or "content" not in value:
        return value
    for parse in (_as_json, ast.literal_eval):
        try:
            found = parse(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # DocumentError is a ValueError
            continue
        messages = [found] if isinstance(found, dict) else found
        if isinstance(messages, list) and all(isinstance(one, dict) for one in messages):
            return messages if all(one.get("role") in _CHAT_ROLES for one in messages) else value
    raise InputError(
        f"{place}: {column} is a text that begins like messages and can't be read as them, neither as JSON nor as "
        f"Python (got {shorten(repr(value))}). Write them as a list of {{role, content}}, or as JSON."
    )


def _as_json(text: str) -> Any:
    return parse_json(text, lenient=True)


def is_plain(prompt: Any, place: str) -> bool:
    """Whether a row's prompt is a text in which no conversation is written down: then its responses are texts too, even
    where they look like messages."""
    return isinstance(prompt, str) and isinstance(decoded(prompt, place, "prompt"), str) and not transcript(prompt)


def response_of(row: Row, column: str) -> Any:
    """The cell of a response, with messages for a text that holds these. Beside a plain prompt they must repeat it."""
    value, prompt = row.cells[column], row.cells.get("prompt")
    if not isinstance(value, str) or not isinstance(prompt, str) or not is_plain(prompt, row.place):
        return decoded(value, row.place, column)
    try:
        found = decoded(value, row.place, column)
    except InputError:  # a text that begins like messages
        return value
    asked = [turn.get("content") for turn in found if turn["role"] == "user"] if isinstance(found, list) else []
    return found if any(isinstance(text, str) and text.strip() == prompt.strip() for text in asked) else value


def transcript(text: str) -> list[dict[str, str]]:
    """The turns of a conversation in one text, each after an empty line and "Human:" or "Assistant:" (Anthropic's HH);
    [] where it is no such text."""
    start, *parts = _SPEAKER.split(text)
    begins = text.startswith("\n\n") or "Assistant" in parts
    if start.strip() or not parts or parts[0] != "Human" or not begins:
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _asked(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns without the place for the answer at their end."""
    return turns[:-1] if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip() else turns


def described(value: Any) -> str:
    return "nothing" if value is None else shorten(f"{type(value).__name__} {value!r}")


def shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit].rstrip() + "..."
