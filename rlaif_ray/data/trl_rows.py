"""Rows of prompt, chosen and rejected, in the forms that TRL and Anthropic's HH have them."""

from __future__ import annotations

import re
from typing import Any

from rlaif_ray.data.messages import Row, read_message, read_messages, response_of, shorten, transcript
from rlaif_ray.errors import InputError
from rlaif_ray.types import Message

_ANSWERED = ("chosen", "rejected")
_FEW_WORDS = 3  # so short a prompt may begin two answers by chance


def read_trl(row: Row) -> tuple[tuple[Message, ...], Any, Any]:
    """Prompt, chosen and rejected response of a TRL row.

    The responses are texts, or messages that end with the assistant's. Messages before that one repeat the prompt, and
    may bring a system message of their own; without a column for it they are the prompt (TRL's implicit form), as are
    the earlier turns of a transcript. Texts may repeat the prompt too. A prompt in which a conversation is written
    down is a text where both responses' messages have it as one (UltraFeedback).
    """
    given = row.cells.get("prompt")
    values = [response_of(row, column) for column in _ANSWERED]
    explicit = None
    if given is not None:
        explicit = _held_as_text(given, values) or read_messages(row, "prompt", None)
        values = _without_prompt(values, given)
    transcripts = [transcript(value) if isinstance(value, str) else [] for value in values]
    before, responses = [], []
    for column, value, written in zip(_ANSWERED, values, transcripts, strict=True):
        if written and (explicit is None or any(_repeats(turns, explicit) for turns in transcripts)):
            value = written  # else one that a model went on to write: part of what it answered
        if not isinstance(value, list):
            if explicit is None and isinstance(value, str):
                raise InputError(
                    f"{row.place}: there is no prompt, and {column} is plain text in which its end can't be seen "
                    f"(got {shorten(repr(value))}). Give the prompt in a column of its own."
                )
            before.append(explicit)
            responses.append(value)
            continue
        turns = tuple(read_message(entry, index, row.place, column) for index, entry in enumerate(value))
        if not turns or turns[-1].role != "assistant":
            raise InputError(
                f"{row.place}: {column} must end with the assistant's message (got "
                f"{turns[-1].role if turns else 'no message'}): that is the response. Correct the row."
            )
        before.append(turns[:-1] or explicit)
        responses.append(turns[-1].content)
    return _prompt_of(row, explicit, before), responses[0], responses[1]


def _without_prompt(values: list[Any], prompt: Any) -> list[Any]:
    """The responses without the prompt's text, where both repeat it before they go on."""
    if not isinstance(prompt, str) or len(prompt.split()) < _FEW_WORDS:
        return values
    start = prompt.strip()
    texts = [value.lstrip() if isinstance(value, str) else "" for value in values]
    if all(re.match(r"\s+\S", text.removeprefix(start)) and text.startswith(start) for text in texts):
        return [text.removeprefix(start).lstrip() for text in texts]
    return values


def _held_as_text(prompt: Any, values: list[Any]) -> tuple[Message, ...] | None:
    """The prompt as one message of the user, where both responses are messages that have it so."""
    for value in values:
        turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
        asked = [turn.get("content") for turn in turns if turn.get("role") == "user"]
        if not isinstance(prompt, str) or len(asked) != 1 or str(asked[0]).strip() != prompt.strip():
            return None
    return (Message("user", prompt),)


def _repeats(turns: list[dict[str, str]], prompt: tuple[Message, ...]) -> bool:
    """Whether a transcript's turns are the prompt and an answer."""
    earlier = tuple(Message(turn["role"], turn["content"]) for turn in turns[:-1])
    return bool(turns) and _stripped(earlier) == _stripped(_asked(prompt))


def _asked(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns without a system message."""
    return turns[1:] if turns and turns[0].role == "system" else turns


def _prompt_of(
    row: Row, explicit: tuple[Message, ...] | None, before: list[tuple[Message, ...] | None]
) -> tuple[Message, ...]:
    """The prompt in its column, and before the responses, which must be the same. A system message counts that both
    responses have and the column leaves out, or the other way about."""
    prompt = explicit or before[0]
    systems = [turns[0] if turns and turns[0].role == "system" else None for turns in before]
    if explicit and explicit[0].role != "system" and systems[0] is not None and systems[0] == systems[1]:
        prompt = (systems[0], *explicit)
    if explicit and explicit[0].role == "system":
        before = [
            turns if system or not turns else (explicit[0], *turns)
            for turns, system in zip(before, systems, strict=True)
        ]
    if not prompt or any(not turns or _stripped(turns) != _stripped(prompt) for turns in before):
        differ = "two conversations that differ before the last message"
        if systems[0] != systems[1]:
            differ = "system messages that differ, or one for one of them only"
        raise InputError(
            f"{row.place}: chosen and rejected must answer the same prompt (got {differ if prompt else 'no prompt'}). "
            "Give the prompt in a column of its own, or correct the row."
        )
    if explicit is not None:
        return prompt
    # the same checks as for a prompt in its column
    shared = [{"role": turn.role, "content": turn.content} for turn in prompt]
    return read_messages(Row(row.place, row.number, {"prompt": shared}), "prompt", None)


def _stripped(turns: tuple[Message, ...]) -> list[tuple[str, str]]:
    return [(turn.role, turn.content.strip()) for turn in turns]
