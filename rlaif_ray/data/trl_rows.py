"""Rows of prompt, chosen and rejected, in the forms that TRL and Anthropic's HH have them."""

from __future__ import annotations

import re
from typing import Any

from rlaif_ray.data.messages import Row, decoded, read_message, read_messages, shorten, transcript
from rlaif_ray.errors import InputError
from rlaif_ray.types import Message

_ANSWERED = ("chosen", "rejected")
_FEW_WORDS = 3  # so short a prompt may begin two answers by chance


def read_trl(row: Row) -> tuple[tuple[Message, ...], Any, Any]:
    """Prompt, chosen and rejected response of a TRL row.

    The responses are texts, or messages that end with the assistant's. Messages before that one repeat the prompt, and
    may bring a system message of their own; without a column for it they are the prompt (TRL's implicit form), as are
    the earlier turns of a transcript. Texts may repeat the prompt too.
    """
    given = row.cells.get("prompt")
    explicit = read_messages(row, "prompt", None) if given is not None else None
    values = _without_prompt([decoded(row.cells[column], row.place, column) for column in _ANSWERED], given)
    before, responses = [], []
    for column, value in zip(_ANSWERED, values, strict=True):
        if isinstance(value, str):
            value = _turns(value, row, column, explicit) or value
        if not isinstance(value, list):
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


def _turns(text: str, row: Row, column: str, explicit: tuple[Message, ...] | None) -> list[dict[str, str]]:
    """The turns of a transcript; [] for a plain response to the prompt that there is."""
    turns = transcript(text)
    if not turns and explicit is None:
        raise InputError(
            f"{row.place}: there is no prompt, and {column} is plain text in which its end can't be seen "
            f"(got {shorten(repr(text))}). Give the prompt in a column of its own."
        )
    return turns


def _prompt_of(
    row: Row, explicit: tuple[Message, ...] | None, before: list[tuple[Message, ...] | None]
) -> tuple[Message, ...]:
    """The prompt in its column, and before the responses, which must be the same. A system message counts that both
    responses have and the column leaves out."""
    prompt = explicit or before[0]
    systems = [turns[0] if turns and turns[0].role == "system" else None for turns in before]
    if explicit and explicit[0].role != "system" and systems[0] is not None and systems[0] == systems[1]:
        prompt = (systems[0], *explicit)
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
