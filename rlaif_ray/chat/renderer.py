"""Conversations, and responses to them, as a model reads and writes them in tokens."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from rlaif_ray.chat.template import ChatTemplate
from rlaif_ray.chat.text import conversation_text
from rlaif_ray.chat.thoughts import CHANNEL, closing_of, in_channels, marks_and_texts, opening_tag
from rlaif_ray.errors import InputError
from rlaif_ray.types import Message

_CHARACTERS = 1 << 20  # that a tokenizer gets at a time


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
        return self.tokens_of([messages], [place])[0]

    def tokens_of(self, conversations: Sequence[Sequence[Message]], places: Sequence[str]) -> list[tuple[int, ...]]:
        """The same of many, which is faster: their texts go to the tokenizer together.

        Raises:
            InputError: of the first that is wrong.
        """
        if not self.chat.source:
            texts = [self._plain(messages) for messages in conversations]
            return [(*self.bos, *tokens) for tokens in self._text_tokens(texts, places)]
        hidden, backs = [], []
        for messages, place in zip(conversations, places, strict=True):
            self.chat.must_reach(messages, place)
            # Stand-ins go through the template for users' control strings, so that those in its output are its own.
            contents, back = self._hidden([message.content for message in messages])
            backs.append(back)
            pairs = zip(messages, contents, strict=True)
            hidden.append([Message(message.role, content) for message, content in pairs] if back else messages)
        return list(map(tuple, self._ids(self.chat.texts(hidden, places), backs, places)))

    def response(self, text: str) -> tuple[int, ...]:
        """A whole response in the tokens that the model has to write after `tokens`, without what ends its turn.

        Where the generation prompt leaves a thought open, a response without one ends it first; where the template
        puts an empty thought before an answer, so does the response. A response that has a thought keeps it.

        The tokens are those of the template's whole text. Tokenizers treat the beginning of a text in their own way
        (SentencePiece puts a blank there, byte-level ones join a blank with the word behind it), so the response is
        tokenised together with the end of the prompt and what stands before the answer.
        """
        return self.responses([text])[0]

    def responses(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The same of many, which is faster."""
        written: list[str] = []
        backs: list[dict[int, str]] = []
        for text in texts:
            before, rest = self._as_written(text)
            pieces = self._pieces(text, rest)
            pieces[::2], back = self._hidden(pieces[::2])
            written.append(before + "".join(pieces))
            backs.append(back)
        found: dict[int, tuple[int, ...]] = {}
        for start in self._starts:
            left = [k for k in range(len(texts)) if k not in found]
            lead, *wholes = self._ids([start, *(start + written[k] for k in left)], [{}, *(backs[k] for k in left)])
            for k, whole in zip(left, wholes, strict=True):
                if whole[: len(lead)] == lead:
                    found[k] = tuple(whole[len(lead) :])
        # The prompt ends in a token of its own all the same: nothing joins these.
        left = [k for k in range(len(texts)) if k not in found]
        alone = self._ids([written[k] for k in left], [backs[k] for k in left])
        found |= {k: tuple(tokens) for k, tokens in zip(left, alone, strict=True)}
        return [found[k] for k in range(len(texts))]

    @cached_property
    def _starts(self) -> list[str]:
        """What a response may be tokenised behind: the end of the generation prompt, from its last control token on;
        where that would merge with the response, and a text alone would get a blank, a line break."""
        if not self.chat.source:
            return []
        prompt = self.chat.answer.prompt
        last = next(reversed([*self.pattern.finditer(prompt)]), None)
        start = prompt[last.start() :] if last else f"x{prompt}" * bool(prompt)
        both, first, second = self._ids(["\na", "\n", "a"], [{}] * 3)
        alone = both[len(first) :] == second
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

    def _ids(
        self, texts: Sequence[str], backs: Sequence[dict[int, str]], places: Sequence[str] | None = None
    ) -> list[list[int]]:
        """Tokens of texts, whose control strings steer the model, while the stand-ins in `backs` are only text."""
        plain = [k for k, back in enumerate(backs) if not back]
        found = dict(zip(plain, self._encoded([texts[k] for k in plain]), strict=True))
        return [
            found[k] if k in found else self._ids_around(text, back, places[k] if places is not None else None)
            for k, (text, back) in enumerate(zip(texts, backs, strict=True))
        ]

    def _ids_around(self, text: str, back: dict[int, str], place: str | None) -> list[int]:
        pieces = self.pattern.split(text)  # text, control string, text, ..., text
        own = [piece.translate(back) for piece in pieces[::2]]
        tokens: list[int] = []
        for index, encoded in enumerate(self._text_tokens(own, None if place is None else [place] * len(own))):
            tokens += encoded
            tokens += [self.control[control] for control in pieces[2 * index + 1 : 2 * index + 2]]
        return tokens

    def _encoded(self, texts: Sequence[str], **how: Any) -> list[list[int]]:
        """The tokenizer's ids of each text.

        Fast tokenizers take many texts at a time and use all cores; what they make of a text does not depend on the
        others. They make a hundred bytes a token on the way, hence some texts at a time.
        """
        how = {"add_special_tokens": False, "verbose": False, **how}
        if len(texts) == 1 or not getattr(self.tokenizer, "is_fast", False):
            return [list(self.tokenizer(text, **how)["input_ids"]) for text in texts]
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # unset, every child that forks later prints a warning
        return [tokens for part in _portions(texts) for tokens in self._encoded_together(part, **how)]

    def _encoded_together(self, texts: list[str], **how: Any) -> list[list[int]]:
        first = list(self.tokenizer(texts[0], **how)["input_ids"])  # also sets `how` in the backend
        if type(self.tokenizer).__module__.startswith("transformers."):  # nobody's own code stands before the backend
            backend = self.tokenizer.backend_tokenizer
            found = [one.ids for one in backend.encode_batch_fast(texts, add_special_tokens=False)]
            if found[0] == first:
                return found
        found = self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, **how)["input_ids"]
        return list(found)

    def turn_end(self) -> tuple[int, ...]:
        """What ends a response in tokens: the added token by which the template ends a turn, else EOS.

        They differ in most models: Llama 3 ends a turn with <|eot_id|>, Gemma with <end_of_turn>, and a base model that
        has a template has the EOS of its texts. A model that is trained to write it must be sampled to stop at it.
        In some tokenizers it is an added token like any other and not marked as special.
        """
        if self.chat.source:
            after = self.chat.answer.after.lstrip()
            added = {str(token): index for index, token in getattr(self.tokenizer, "added_tokens_decoder", {}).items()}
            found = [text for text in (added | self.control) if text and after.startswith(text)]
            if found:
                return ((added | self.control)[max(found, key=len)],)
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

    def _text_tokens(self, texts: Sequence[str], places: Sequence[str] | None) -> list[list[int]]:
        """Tokens of texts in which nothing is a control token. `places` are of prompts, which are refused where their
        control strings can't be read as text."""
        found = self._encoded(texts, split_special_tokens=True)
        for text, encoded, place in zip(texts, found, places or (), strict=False):
            for control in self.pattern.findall(text):
                if self.control[control] in encoded and self.control[control] != self.tokenizer.unk_token_id:
                    raise InputError(
                        f"{place}: the prompt contains {control!r}, which the policy's tokenizer reads as its control "
                        f"token and cannot read as text (got {type(self.tokenizer).__name__}). Remove it from the "
                        f"prompt."
                    )
        return found


def _portions(texts: Sequence[str]) -> Iterator[list[str]]:
    """Neighbours, together at most `_CHARACTERS` long where they are several."""
    part: list[str] = []
    size = 0
    for text in texts:
        if part and size + len(text) > _CHARACTERS:
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield part
