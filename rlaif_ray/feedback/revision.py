"""Constitutional revision: a response, a critique of it by a principle, a revision, and so on (Bai et al. 2212.08073).

Each step draws its own principle and sees the prompt with the response as it then stands, not the steps before: the
conversation begins anew with the revised response in its place.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif_ray.chat.thoughts import OPEN_THOUGHT, answer_of
from rlaif_ray.feedback.files import LIST, TEXT, WHOLE, Source, find, key_problems, read, refuse, shown
from rlaif_ray.feedback.neutral import neutralise
from rlaif_ray.feedback.principles import draw_principle
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.types import Message, Question

if TYPE_CHECKING:
    from rlaif_ray.feedback.principles import Constitution
    from rlaif_ray.interfaces import Asker

SHIPPED = Path(__file__).with_name("revisions")

_KEYS = {"name": TEXT, "version": WHOLE, "examples": LIST}
_EXAMPLE_KEYS = dict.fromkeys(
    ("prompt", "response", "critique_request", "critique", "revision_request", "revision"), TEXT
)


@dataclass(frozen=True, slots=True)
class Example:
    """A worked critique and revision, shown before every request: without one, small models lose whose words are whose
    (Bai et al., section 3.1)."""

    prompt: str
    response: str
    critique_request: str
    critique: str
    revision_request: str
    revision: str

    @property
    def turns(self) -> tuple[Message, ...]:
        return (
            Message("user", self.prompt),
            Message("assistant", self.response),
            Message("user", self.critique_request),
            Message("assistant", self.critique),
            Message("user", self.revision_request),
            Message("assistant", self.revision),
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One critique and revision."""

    principle: str  # its id
    critique: str
    revision: str


@dataclass(frozen=True, slots=True)
class Revised:
    """A prompt with its first response and what became of it."""

    id: str
    response: str
    steps: tuple[Step, ...] = ()  # whole ones, in order
    failure: str | None = None  # why there is no further step: "empty_critique", "echoed_revision", "too_long", ...

    @property
    def last(self) -> str:
        """The response as it stands."""
        return self.steps[-1].revision if self.steps else self.response


@dataclass(slots=True)
class _Draft:
    """A prompt on its way."""

    id: str
    messages: tuple[Message, ...]
    revised: Revised
    critique: str = ""
    principle: str = ""
    done: bool = field(default=False)


class Reviser:
    """Takes prompts through responses, critiques and revisions, all prompts of a call side by side."""

    def __init__(
        self,
        asker: Asker,
        constitution: Constitution,
        *,
        steps: int,
        response: GenerationSettings,
        revision: GenerationSettings,
        examples: Sequence[Example] = (),
        only: tuple[str, ...] | None = None,
        seed: int = 0,
        heads: Sequence[str] = (),
        tags: Sequence[str] = (),
    ) -> None:
        """`response` is how the first response is sampled, `revision` how critiques and revisions are; `heads` are
        plain words by which the model tells whose turn it is: in texts they are broken, as special tokens are. `tags`
        are how thoughts of the model begin: what it thinks before it answers is no part of any text."""
        self._asker, self._constitution, self._steps = asker, constitution, steps
        self._response, self._revision = response, revision
        self._special = (*asker.special, *heads)
        self._examples = tuple(turn for example in examples for turn in self._turns(example))
        self._only, self._seed, self._tags = only, seed, tuple(tags)

    def revise(self, prompts: Sequence[tuple[str, tuple[Message, ...]]]) -> list[Revised]:
        """One for each (id, conversation that ends with the user), in order."""
        drafts = [
            _Draft(name, tuple(replace(m, content=self._plain(m.content)) for m in messages), Revised(name, ""))
            for name, messages in prompts
        ]
        self._ask(drafts, [Question(d.messages) for d in drafts], self._response, self._take_response)
        for number in range(self._steps):
            going = [d for d in drafts if not d.done]
            requests = [self._critique_request(d, number) for d in going]
            self._ask(going, requests, self._revision, self._take_critique)
            going = [d for d in going if not d.done]
            requests = [self._revision_request(d, number) for d in going]
            self._ask(going, requests, self._revision, self._take_revision)
        return [d.revised for d in drafts]

    def _plain(self, text: str) -> str:
        return neutralise(text, (), self._special)

    def _turns(self, example: Example) -> Iterator[Message]:
        """An example's turns: a user may have written it."""
        return (replace(turn, content=self._plain(turn.content)) for turn in example.turns)

    def _ask(
        self,
        drafts: Sequence[_Draft],
        questions: Sequence[Question],
        settings: GenerationSettings,
        take: Callable[[_Draft, str], None],
    ) -> None:
        for i, reply in self._asker.explain(questions, settings) if questions else ():
            answer = None if reply.failure is not None else answer_of(reply.texts[0], self._tags)
            if answer is None:
                self._end(drafts[i], reply.failure or OPEN_THOUGHT)
            else:
                take(drafts[i], self._plain(answer).strip())

    def _end(self, draft: _Draft, failure: str) -> None:
        draft.done = True
        draft.revised = replace(draft.revised, failure=failure)

    # Requests

    def _principle(self, draft: _Draft, number: int) -> tuple[str, str, str]:
        drawn = draw_principle(
            self._constitution,
            f"{draft.id}/{number}",
            self._seed,
            needs=("critique_request", "revision_request"),
            only=self._only,
        )
        return drawn.id, drawn.critique_request or "", drawn.revision_request or ""

    def _critique_request(self, draft: _Draft, number: int) -> Question:
        draft.principle, request, _ = self._principle(draft, number)
        now = Message("assistant", draft.revised.last)
        return Question((*self._shown(draft), now, Message("user", request)))

    def _revision_request(self, draft: _Draft, number: int) -> Question:
        _, critique_request, revision_request = self._principle(draft, number)
        turns = (
            Message("assistant", draft.revised.last),
            Message("user", critique_request),
            Message("assistant", draft.critique),
            Message("user", revision_request),
        )
        return Question((*self._shown(draft), *turns))

    def _shown(self, draft: _Draft) -> tuple[Message, ...]:
        """The examples and the conversation; a system message stays the first."""
        first = draft.messages[:1] if draft.messages[0].role == "system" else ()
        return (*first, *self._examples, *draft.messages[len(first) :])

    # Replies

    def _take_response(self, draft: _Draft, text: str) -> None:
        if not text:
            self._end(draft, "empty_response")
        draft.revised = replace(draft.revised, response=text)

    def _take_critique(self, draft: _Draft, text: str) -> None:
        draft.critique = text
        if not text:
            self._end(draft, "empty_critique")
        elif same_words(text, draft.revised.last):
            self._end(draft, "echoed_critique")

    def _take_revision(self, draft: _Draft, text: str) -> None:
        if not text:
            self._end(draft, "empty_revision")
        elif same_words(text, draft.revised.last) or same_words(text, draft.critique):
            self._end(draft, "echoed_revision")
        else:
            step = Step(draft.principle, draft.critique, text)
            draft.revised = replace(draft.revised, steps=(*draft.revised.steps, step))


def same_words(one: str, other: str) -> bool:
    """Whether two texts differ in nothing but case, spacing and punctuation: then nothing was done."""
    return _words(one) == _words(other)


def _words(text: str) -> list[str]:
    # Letters, marks, numbers and symbols, emoji among them.
    shown = (c if unicodedata.category(c)[0] in "LMNS" else " " for c in text.casefold())
    return "".join(shown).split()


# ---- Files -----------------------------------------------------------------------------------------------------------


def load_examples(name_or_path: str, setting: str = "revision.examples") -> tuple[Example, ...]:
    """Shipped examples by name, or a user's own YAML file.

    Raises:
        InputError: with everything that is wrong with it.
    """
    source = read(find(name_or_path, SHIPPED, setting), setting)
    refuse(source, "examples", _problems(source), SHIPPED / "default.yaml")
    return tuple(Example(**{key: text.strip() for key, text in one.items()}) for one in source.values["examples"])


def _problems(source: Source) -> Iterator[str]:
    yield from key_problems(source, source.values, _KEYS)
    examples = source.values.get("examples")
    for number, example in enumerate(examples if isinstance(examples, list) else ()):
        at = ("examples", str(number))
        if not isinstance(example, dict):
            yield f"{source.line(*at)}: an example must have the texts of a dialogue (got {shown(example)})"
            continue
        yield from key_problems(source, example, _EXAMPLE_KEYS, at=at)
        for key in _EXAMPLE_KEYS:
            if isinstance(example.get(key), str) and not example[key].strip():
                yield f"{source.line(*at, key)}: {key} must not be empty"
