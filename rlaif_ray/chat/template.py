"""A model's chat template: the one door through which conversations become the text that a model reads.

Policies, judges, reward models and what they are trained on come through it, with the config's arguments to the
template and the run's date, so that the same conversation reads the same everywhere in a run.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlaif_ray.chat.thoughts import closed, closing_of, known_tags, open_thought, opening_tag
from rlaif_ray.errors import InputError
from rlaif_ray.types import Message

_CLOCK = "strftime_now"  # the one way in which transformers gives templates the date

# What judges are told, where their templates know it: their answer is read right after the prompt.
WITHOUT_THOUGHTS: Mapping[str, Any] = {"enable_thinking": False, "thinking": False}


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What stands around an answer of the assistant, beyond its text, seen from where the model begins to write."""

    opened: str  # the thought that the generation prompt leaves open, such as "<think>\n"; "" without one
    before: str  # what the model writes before its answer: the end of that thought, an empty one, a channel; or ""
    after: str  # what the template writes after the answer
    prompt: str = ""  # the generation prompt: what stands between the user's text and where the model begins to write


class ChatTemplate:
    """A tokenizer's chat template with its arguments and the date that it sees."""

    def __init__(
        self,
        tokenizer: Any,
        arguments: Mapping[str, Any] | None = None,
        date: str | None = None,
        *,
        defaults: Mapping[str, Any] | None = None,
        key: str = "policy",
    ) -> None:
        """
        Args:
            arguments: the config's chat_template_kwargs.
            date: for templates that write today's, as 2026-11-30; None: the clock's.
            defaults: more arguments, for templates that know them.
            key: the model's section in the config, for messages.

        Raises:
            InputError: the template does not use one of the arguments.
        """
        self.tokenizer = tokenizer
        self.key = key
        self.source = _source(tokenizer)
        for name in arguments or {}:
            if not self._knows(name):
                raise InputError(
                    f"{key}.chat_template_kwargs has {name!r}, which the chat template of its model does not use (got "
                    f"{'a template without it' if self.source else 'a model without a chat template'}): it would "
                    f"change nothing. Remove it, or correct its name."
                )
        known = {name: value for name, value in (defaults or {}).items() if self._knows(name)}
        self._arguments = {**known, **(arguments or {})}
        self.uses_date = self._knows(_CLOCK)
        self._date = datetime.datetime.fromisoformat(date) if date and self.uses_date else None
        self._lost: dict[tuple[tuple[str, bool], ...], list[str]] = {}  # roles that don't reach the text

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate:
        """`tokenizer` as it is, if it is a ChatTemplate, else one without arguments."""
        return tokenizer if isinstance(tokenizer, ChatTemplate) else cls(tokenizer)

    @property
    def identity(self) -> str:
        """What the text depends on beside tokenizer and conversation; "" for nothing."""
        parts = [json.dumps(self._arguments, sort_keys=True)] if self._arguments else []
        return "/".join([*parts, *([f"{self._date:%Y-%m-%d}"] if self._date else [])])

    def text(self, messages: Sequence[Message], place: str, *, to_answer: bool = True) -> str:
        """The conversation, with `to_answer` up to where the model begins to write.

        Raises:
            InputError: the template refuses the conversation; names `place`.
        """
        from jinja2 import TemplateError

        try:
            return str(self._applied(_turns(messages), to_answer))
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message.role for message in messages)
            raise InputError(
                f"{place}: the chat template of {self.key} refuses the conversation (got {roles}: {error}). "
                "Give turns that it takes; if it takes no system message, leave system out."
            ) from error

    def texts(self, conversations: Sequence[Sequence[Message]], places: Sequence[str]) -> list[str]:
        """`text` of each, up to where the model begins to write.

        Raises:
            InputError: the template refuses one.
        """
        from jinja2 import TemplateError

        if len(conversations) > 1:
            try:
                return list(map(str, self._applied(list(map(_turns, conversations)), True)))
            except (TemplateError, TypeError):
                pass  # of one of them, which is found below
        return [self.text(messages, place) for messages, place in zip(conversations, places, strict=True)]

    def _applied(self, turns: Any, to_answer: bool) -> Any:
        """The text of the turns of a conversation, or of each of several: the template is looked up once for these."""
        clock = {_CLOCK: self._date.strftime} if self._date else {}
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=to_answer, tokenize=False, **self._arguments, **clock
        )

    def must_reach(self, messages: Sequence[Message], place: str) -> None:
        """That every message is in what the model reads. What a template does to a text, such as to trim it, is fine.

        Raises:
            InputError: the template leaves a message out, without an error of its own.
        """
        if not self.source:
            return
        shape = tuple((message.role, bool(message.content)) for message in messages)
        if shape not in self._lost:
            marks = [f"xq{k}mark{k}qx" for k in range(len(shape))]
            marked = [Message(role, mark if full else "") for (role, full), mark in zip(shape, marks, strict=True)]
            text = self.text(marked, place).lower()
            found = [
                role for (role, full), mark in zip(shape, marks, strict=True) if full and text.count(mark.lower()) == 0
            ]
            self._lost[shape] = found
        lost = self._lost[shape]
        if lost:
            remedy = "put it into the user's message or take it out (data.system, or the row's own)"
            raise InputError(
                f"{place}: the chat template of {self.key} leaves out the {lost[0]} message (got "
                f"{', '.join(role for role, _ in shape)}): the model would never read it. Use a model whose template "
                f"takes it, or {remedy if lost[0] == 'system' else 'remove that message'}."
            )

    @property
    def thinks(self) -> bool:
        """Whether the config asks for thoughts."""
        return any(self._arguments.get(name) for name in WITHOUT_THOUGHTS)

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """How thoughts of this model begin, as far as its template and tokenizer know any."""
        return known_tags(self.tokenizer, self.source)

    @cached_property
    def answer(self) -> AnswerShape:
        """Read off the template, with and without an answer."""
        user, said = "xqusermarkqx", "xqanswermarkqx"
        asked = self.text([Message("user", user)], "a conversation of one message")
        prompt = asked.rpartition(user)[2]
        opened = open_thought(prompt)
        end = closed(opened) if opened else ""
        try:
            turns = [Message("user", user), Message("assistant", said)]
            whole = self.text(turns, "a conversation of two messages", to_answer=False)
        except InputError:  # there are templates for a single question
            whole = ""
        head, found, after = whole.rpartition(user)[2].partition(said)
        if not found or user not in asked or not head.startswith(prompt):
            return AnswerShape(opened, end, after if found else "", prompt)
        before = head.removeprefix(prompt)
        if opened and closing_of(opening_tag(opened)) not in before:  # it writes every answer into the thought
            before += end
        return AnswerShape(opened, before, after, prompt)

    def _knows(self, name: str) -> bool:
        return bool(re.search(rf"\b{re.escape(name)}\b", self.source))


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _source(tokenizer: Any) -> str:
    """The template's own text; "" without one. Of several the default counts."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default", "")
    return template or ""
