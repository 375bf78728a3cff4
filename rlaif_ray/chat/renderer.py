"""Conversations, and responses to them, as a model reads and writes them in tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

from rlaif_ray.chat.template import ChatTemplate
from rlaif_ray.chat.text import conversation_text
from rlaif_ray.chat.thoughts import CHANNEL, closing_of, in_channels, marks_and_texts, opening_tag
from rlaif_ray.errors import InputError
from rlaif_ray.types import Message


class ChatRenderer:
    """Messages to tokens, with what users wrote kept apart from the tokens that steer the model.

    "<|im_end|>" in a prompt is text about chat formats, or an attack; as the token of that name it would end the turn.
    transformers renders the conversation to one string first and then cannot tell the two apart.
    """

    def __init__(self, chat: Any) -> None:
        """`chat` is a ChatTemplate, or a tokenizer whose template takes no arguments."""
        self.chat = ChatTemplate.of(chat)
        self.tokenizer: Any = self.chat.tokenizer
        tokenizer = self.tokenizer
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
        if not self.chat.source:
            return tuple(self.bos + self._text_tokens(self._plain(messages), place))
        self.chat.must_reach(messages, place)
        # Stand-ins go through the template for the users' control strings, so that those in its output are its own.
        contents, back = self._hidden([message.content for message in messages])
        hidden = [Message(message.role, content) for message, content in zip(messages, contents, strict=True)]
        return tuple(self._ids(self.chat.text(hidden, place), back, place))

    def response(self, text: str) -> tuple[int, ...]:
        """A whole response in the tokens that the model has to write after `tokens`, without what ends its turn.

        Where the generation prompt leaves a thought open, a response without one ends it first; where the template
        puts an empty thought before an answer, so does the response. A response that has a thought keeps it.

        The tokens are those of the template's whole text. Tokenizers treat the beginning of a text in their own way
        (SentencePiece puts a blank there, byte-level ones join a blank with the word behind it), so the response is
        tokenised together with the end of the prompt and what stands before the answer.
        """
        before, rest = self._as_written(text)
        pieces = self._pieces(text, rest)
        texts, back = self._hidden(pieces[::2])
        pieces[::2] = texts
        written = before + "".join(pieces)
        for start in self._starts:
            lead, whole = self._ids(start, {}), self._ids(start + written, back)
            if whole[: len(lead)] == lead:
                return tuple(whole[len(lead) :])
        # The prompt ends in a token of its own all the same: nothing joins it.
        return tuple(self._ids(written, back))

    @cached_property
    def _starts(self) -> list[str]:
        """What a response may be tokenised behind: the end of the generation prompt, from its last control token on;
        where that would merge with the response, and a text alone would get a blank, a line break."""
        if not self.chat.source:
            return []
        prompt = self.chat.answer.prompt
        last = next(reversed([*self.pattern.finditer(prompt)]), None)
        start = prompt[last.start() :] if last else f"x{prompt}" * bool(prompt)
        alone = self._ids("\na", {})[len(self._ids("\n", {})) :] == self._ids("a", {})
        return [start] * bool(start) + ["\n"] * (not alone)

    def _hidden(self, texts: Sequence[str]) -> tuple[list[str], dict[int, str]]:
        """The texts with a stand-in for every control string in them; and what each stands for, for str.translate."""
        found = sorted({control for text in texts for control in self.pattern.findall(text)})
        if not found:
            return list(texts), {}
        contents = "".join(texts)
        unused = (chr(code) for code in range(0xE000, 0xF900) if chr(code) not in contents)  # for private use
        stand_in = dict(zip(found, unused, strict=False))
        back = {ord(mark): text for text, mark in stand_in.items()}
        return [self.pattern.sub(lambda match: stand_in[match[0]], text) for text in texts], back

    def _ids(self, text: str, back: dict[int, str], place: str | None = None) -> list[int]:
        """Tokens of `text`, whose control strings steer the model, while the stand-ins in `back` are only text."""
        if not back:
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        tokens: list[int] = []
        for index, piece in enumerate(self.pattern.split(text)):  # text, control string, text, ..., text
            tokens += [self.control[piece]] if index % 2 else self._text_tokens(piece.translate(back), place)
        return tokens

    def turn_end(self, stops: Collection[int]) -> tuple[int, ...]:
        """What ends a response in tokens: how the template ends a turn, where sampling stops at it, else EOS.

        `stops` are the tokens at which sampling stops. A template whose end is none of them is one that a base model
        was given with its tokenizer: trained to write it, the model would go on.
        """
        found = self.pattern.match(self.chat.answer.after.lstrip()) if self.chat.source else None
        if found and self.control[found[0]] in stops:
            return (self.control[found[0]],)
        eos = self.tokenizer.eos_token_id
        return () if eos is None else (eos,)

    @property
    def opened(self) -> str:
        """The thought that the generation prompt leaves open, such as "<think>\\n"; "" without one."""
        return self.chat.answer.opened if self.chat.source else ""

    def _as_written(self, text: str) -> tuple[str, str]:
        """What the template has the model write before the response, and the response from where the model begins."""
        if not self.chat.source:
            return "", text
        shape, tag = self.chat.answer, opening_tag(text)
        if shape.opened:
            expected = opening_tag(shape.opened)
            if tag == expected:
                return "", text.lstrip().removeprefix(tag).removeprefix(shape.opened.removeprefix(expected))
            thought, end, _ = text.partition(closing_of(expected))
            goes_on = bool(end) and expected not in thought
            return ("", text) if goes_on else (shape.before, text)
        if in_channels(text) and shape.before.startswith(CHANNEL):
            return "", text.lstrip()
        if tag and tag in shape.before:  # the response's own thought stands for the empty one
            start = shape.before.index(tag)
            _, _, after = shape.before[start:].partition(closing_of(tag))
            return shape.before[:start] + after.lstrip(), text.lstrip()
        # A sampled text may begin with the blank that the template writes before answers: there is one, not two.
        return (shape.before.rstrip(" ") if text.startswith(" ") else shape.before), text

    def _pieces(self, text: str, rest: str) -> list[str]:
        """The `rest` of a response as text, control token, text, ..., text: its thought's tags steer the model."""
        if in_channels(text) and self.chat.source and self.chat.answer.before.startswith(CHANNEL):
            return marks_and_texts(rest)
        tag = opening_tag(text)
        tags = [re.escape(mark) for mark in (tag, closing_of(tag)) if mark in self.control] if tag else []
        return re.split(f"({'|'.join(tags)})", rest, maxsplit=2) if tags else [rest]

    def _plain(self, messages: Sequence[Message]) -> str:
        """For a model without a chat template: the text itself, or labelled turns that end with the policy's own."""
        text = conversation_text(messages)
        system = f"{messages[0].content}\n\n" if messages[0].role == "system" and messages[0].content else ""
        several = sum(message.role != "system" for message in messages) > 1
        return system + text + ("\n\nAssistant:" if several else "\n")

    def _text_tokens(self, text: str, place: str | None) -> list[int]:
        """Tokens of `text`, where nothing is a control token. `place` is of a prompt, which is refused where its
        control strings can't be read as text."""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        for control in self.pattern.findall(text) if place is not None else ():
            if self.control[control] in encoded and self.control[control] != self.tokenizer.unk_token_id:
                raise InputError(
                    f"{place}: the prompt contains {control!r}, which the policy's tokenizer reads as its control "
                    f"token and cannot read as text (got {type(self.tokenizer).__name__}). Remove it from the prompt."
                )
        return list(encoded)
