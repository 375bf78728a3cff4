"""All prompts of a run, a million of them too, in little memory: a Prompt is made when it is asked for."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

from rlaif_ray.chat.text import conversation_text
from rlaif_ray.data.columns import END, TOKEN, Picked, Texts, TokenLists
from rlaif_ray.types import Message, Prompt

_NUMBER = "I"  # of `array`, for numbers of rows
_COMMON = "common system"  # stands for the role of a system message that is kept once


class Conversations:
    """Conversations with their ids."""

    def __init__(self, system: str | None) -> None:
        """`system` is a system message that many of them begin with: it is kept once."""
        self._system = system
        self.ids = Texts()
        self._contents = Texts()  # of all messages, one after the other
        self._ends = array(END)  # of each conversation, in messages
        self._shape_of = array(_NUMBER)  # of each conversation, its number in `_shapes`
        self._shapes: dict[tuple[tuple[str, bool], ...], int] = {}  # role, and whether there is a text, of each message
        self._roles: list[tuple[str, ...]] = []  # of each shape

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, name: str, messages: Sequence[Message]) -> None:
        common = bool(messages) and messages[0].role == "system" and messages[0].content == self._system
        for message in messages[1:] if common else messages:
            self._contents.append(message.content)
        roles = [message.role for message in messages]
        if common:
            roles[0] = _COMMON
        shape = tuple((role, bool(message.content)) for role, message in zip(roles, messages, strict=True))
        if shape not in self._shapes:
            self._shapes[shape] = len(self._roles)
            self._roles.append(tuple(roles))
        self._shape_of.append(self._shapes[shape])
        self._ends.append(len(self._contents))
        self.ids.append(name)

    def messages(self, row: int) -> tuple[Message, ...]:
        roles = self._roles[self._shape_of[row]]
        common = [Message("system", self._system or "")] if roles[:1] == (_COMMON,) else []
        contents = self._contents[self._ends[row - 1] if row else 0 : self._ends[row]]
        own = roles[len(common) :]
        return (*common, *(Message(role, text) for role, text in zip(own, contents, strict=True)))

    def one_of_each_shape(self, rows: Sequence[int]) -> list[int]:
        """Of these rows the first with each sequence of roles and of empty contents."""
        return list({self._shape_of[row]: row for row in reversed(rows)}.values())[::-1]


class Places:
    """Where rows stand, such as "p.jsonl, line 3"."""

    def __init__(self) -> None:
        self._heads: dict[str, int] = {}
        self._files: list[str] = []
        self._head_of = array(_NUMBER)
        self._numbers = array(END)

    def append(self, place: str) -> None:
        head, _, number = place.rpartition(" ")  # every place ends with the number of its line or row
        if head not in self._heads:
            self._heads[head] = len(self._files)
            self._files.append(head)
        self._head_of.append(self._heads[head])
        self._numbers.append(int(number))

    def __getitem__(self, row: int) -> str:
        return f"{self._files[self._head_of[row]]} {self._numbers[row]}"


class PromptTable(Sequence[Prompt]):
    """Prompts in their order. A slice shares the columns."""

    def __init__(
        self,
        conversations: Conversations,
        tokens: TokenLists,
        rows: Sequence[int],
        *,
        opened: str = "",
        tags: tuple[str, ...] | None = None,
    ) -> None:
        """
        Args:
            tokens: of each conversation.
            rows: the numbers of those that are prompts, ascending.
            opened: of every prompt.
            tags: of every prompt.
        """
        self._conversations, self._tokens = conversations, tokens
        self.rows = rows
        self._opened, self._tags = opened, tags

    @classmethod
    def empty(cls) -> PromptTable:
        return cls(Conversations(None), TokenLists(), range(0))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptTable: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptTable:
        rows = self.rows[index]
        if not isinstance(rows, int):
            return PromptTable(self._conversations, self._tokens, rows, opened=self._opened, tags=self._tags)
        messages = self._conversations.messages(rows)
        tokens, name = self._tokens[rows], self._conversations.ids[rows]
        return Prompt(name, messages, tokens, conversation_text(messages), opened=self._opened, tags=self._tags)

    @property
    def ids(self) -> Sequence[str]:
        return Picked(self._conversations.ids, self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt; 0 without any."""
        return max(map(self._tokens.length, self.rows), default=0)

    def one_of_each_shape(self) -> list[Prompt]:
        """The first prompt with each sequence of roles and of empty contents."""
        found = self._conversations.one_of_each_shape(self.rows)
        return list(PromptTable(self._conversations, self._tokens, found, opened=self._opened, tags=self._tags))

    def known_by(self) -> Iterator[tuple[str, array[int]]]:
        """Id and tokens of each."""
        return ((self._conversations.ids[row], self._tokens.array(row)) for row in self.rows)


def prompts_digest(*parts: Sequence[Prompt]) -> str:
    """Number and hash of prompts: the same for the same ids and tokens in the same parts."""
    digest = hashlib.sha256()
    for prompts in parts:
        digest.update(struct.pack("<Q", len(prompts)))
        if isinstance(prompts, PromptTable):
            known = prompts.known_by()
        else:
            known = ((prompt.id, array(TOKEN, prompt.tokens)) for prompt in prompts)
        for name, tokens in known:
            data = name.encode("utf-8", "surrogatepass")
            digest.update(struct.pack("<QQ", len(data), len(tokens)) + data)
            digest.update(tokens)
    return f"{sum(map(len, parts))}-{digest.hexdigest()[:16]}"


def repeated(values: array[int]) -> list[tuple[int, int]]:
    """Places of equal values next to each other in order: (the one before, the later one), by the later one."""
    import numpy as np

    found = np.frombuffer(values, dtype=np.int64)
    order = np.argsort(found, kind="stable")
    same = np.flatnonzero(found[order][1:] == found[order][:-1])
    return sorted(((int(order[k]), int(order[k + 1])) for k in same), key=lambda pair: pair[1])
