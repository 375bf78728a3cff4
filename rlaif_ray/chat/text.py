"""Conversations as a judge reads them in text."""

from __future__ import annotations

from collections.abc import Sequence

from rlaif_ray.types import Message


def conversation_text(messages: Sequence[Message]) -> str:
    """The conversation as a judge reads it: one message as it is, several as "User: ...", "Assistant: ...".

    System messages are left out: they tell the policy how to answer and are no part of the conversation.
    """
    turns = [message for message in messages if message.role != "system"]
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)
