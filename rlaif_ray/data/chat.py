"""Conversations as a model reads them in tokens, and as a judge reads them in text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlaif_ray.errors import InputError
from rlaif_ray.types import Message


def conversation_text(messages: Sequence[Message]) -> str:
    """The conversation as a judge reads it: one message as it is, several as "User: ...", "Assistant: ...".

    System messages are left out: they tell the policy how to answer and are no part of the conversation.
    """
    turns = [message for message in messages if message.role != "system"]
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)


class ChatRenderer:
    """Messages to tokens, with what users wrote kept apart from the tokens that steer the model.

    "<|im_end|>" in a prompt is text about chat formats, or an attack; as the token of that name it would end the turn.
    transformers renders the conversation to one string first and then cannot tell the two apart.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.control: dict[str, int] = {str(token): index for index, token in added.items() if token.special}
        for text in tokenizer.all_special_tokens:
            self.control.setdefault(text, tokenizer.convert_tokens_to_ids(text))
        longest_first = sorted(filter(None, self.control), key=lambda text: (-len(text), text))
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
        bos = tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []

    def tokens(self, messages: Sequence[Message], place: str) -> tuple[int, ...]:
        """The conversation up to where the policy begins to write. `place` is for the error message."""
        if self.tokenizer.chat_template is None:
            return tuple(self.bos + self._text_tokens(self._plain(messages), place))
        found = sorted({control for message in messages for control in self.pattern.findall(message.content)})
        if not found:
            return tuple(
                self.tokenizer(self._chat(messages, place), add_special_tokens=False, verbose=False)["input_ids"]
            )
        # Stand-ins go through the template for the users' control strings, so that those in its output are its own.
        contents = "".join(message.content for message in messages)
        unused = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in contents)  # for private use
        stand_in = dict(zip(found, unused, strict=False))
        back = str.maketrans({mark: text for text, mark in stand_in.items()})
        hidden = [
            Message(message.role, self.pattern.sub(lambda match: stand_in[match[0]], message.content))
            for message in messages
        ]
        pieces = self.pattern.split(self._chat(hidden, place))  # text, control string, text, ..., text
        tokens: list[int] = []
        for index, piece in enumerate(pieces):
            tokens += [self.control[piece]] if index % 2 else self._text_tokens(piece.translate(back), place)
        return tuple(tokens)

    def _chat(self, messages: Sequence[Message], place: str) -> str:
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise InputError(
                f"{place}: the policy's chat template refuses the conversation (got {roles}: {error}). "
                "Give turns that it takes; if it takes no system message, leave system out."
            ) from error

    def _plain(self, messages: Sequence[Message]) -> str:
        """For a model without a chat template: the text itself, or labelled turns that end with the policy's own."""
        text = conversation_text(messages)
        system = f"{messages[0].content}\n\n" if messages[0].role == "system" and messages[0].content else ""
        several = sum(message.role != "system" for message in messages) > 1
        return system + text + ("\n\nAssistant:" if several else "\n")

    def _text_tokens(self, text: str, place: str) -> list[int]:
        """Tokens of `text`, where nothing is a control token."""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for control in self.pattern.findall(text):
            if self.control[control] in encoded and self.control[control] != self.tokenizer.unk_token_id:
                raise InputError(
                    f"{place}: the prompt contains {control!r}, which the policy's tokenizer reads as its control "
                    f"token and cannot read as text (got {type(self.tokenizer).__name__}). Remove it from the prompt."
                )
        return list(encoded)
