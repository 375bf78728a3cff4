"""A judge on our own engines: questions become token prompts of a Generator, its log-probabilities become answers."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rlaif_ray.chat.template import WITHOUT_THOUGHTS, ChatTemplate
from rlaif_ray.chat.thoughts import closed
from rlaif_ray.errors import EngineError
from rlaif_ray.feedback.answers import AnswerTrie, Tokens
from rlaif_ray.output import shown
from rlaif_ray.types import Answer, Explanation, Message, Prompt, Question, TokenQuery

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlaif_ray.interfaces import GenerationSettings, Generator

# Role markers that a chat template writes but its tokenizer may not list as special: <think>, [INST], <<SYS>>.
_TEMPLATE_WORD = re.compile(r"<<?/?[^\s<>'\"{}]{1,40}>>?|\[/?[A-Z_]{2,}\]")


_HEAD = re.compile(r"(?m)^[ \t#*]*([^\W\d_][\w ]{0,30}:)")  # "Human:", "### Instruction:" without what decorates it


class ChatPrompts:
    """Writes conversations the way a model reads them, in text and in tokens. Needs no engine."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | ChatTemplate) -> None:
        self._chat = as_judge(tokenizer)
        self._tokenizer: Any = self._chat.tokenizer
        self._leading = [] if self._chat.source else _leading_tokens(self._tokenizer)
        self.special = _special_texts(self._tokenizer)
        self.identity = self._chat.identity  # what prompts depend on beside tokenizer and conversation

    def text(self, turns: Sequence[Message], answer_prefix: str = "") -> str:
        """What the model reads, up to where it writes."""
        if not self._chat.source:
            if len(turns) == 1:
                return f"{turns[0].content}\n\n{answer_prefix}"
            labelled = [f"{turn.role.capitalize()}: {turn.content}" for turn in turns]
            return "\n\n".join([*labelled, f"Assistant: {answer_prefix}".rstrip()])
        chat, shape = self._chat.text(turns, f"a question to {self._chat.key}"), self._chat.answer
        # The answer is no part of a thought, and stands where the template has answers: in GPT-OSS's final channel.
        if shape.opened:
            before = closed(shape.opened) if chat.endswith(shape.opened) else ""
        else:
            before = "" if self._chat.thinks else shape.before
        # A blank belongs to the word behind it: without one the model writes both.
        return f"{chat}{before if answer_prefix else before.rstrip(' ')}{answer_prefix}"

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of the prompts. Special ones come from the chat template only: user texts have none left."""
        if not texts:
            return []
        rows = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [(*self._leading, *row) for row in rows]

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class LocalAsker:
    """An Asker over a Generator."""

    def __init__(
        self,
        generator: Generator | None,
        tokenizer: PreTrainedTokenizerBase | ChatTemplate,
        max_context: int,
        name: str,
        *,
        identity: str | None = None,
        prices: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """`generator` may be None for one that only writes prompts, to check input before engines start.

        Args:
            tokenizer: the judge model's, or a ChatTemplate that brings it with arguments and a date.
            max_context: tokens that its engine takes, prompt and answer together.
            prices: of a million tokens read and written.
        """
        self.name = name
        self.max_context = max_context
        self.prompts = ChatPrompts(tokenizer)
        of_template = f"/{self.prompts.identity}" if self.prompts.identity else ""
        self.identity = f"{identity or f'local/{name}/{max_context}'}{of_template}"
        self.special = self.prompts.special
        self._generator = generator
        self._prices = prices
        self._tries: dict[tuple[str, tuple[str, ...]], AnswerTrie] = {}

    def text(self, question: Question) -> str:
        """All that the judge reads."""
        return self.prompts.text(question.turns, question.answer_prefix)

    def _trie(self, question: Question, text: str) -> AnswerTrie:
        """How the question's answers continue `text`, its prompt.

        Raises:
            InputError: the judge's tokenizer does not tell the answers apart.
        """
        last = question.turns[-1].content.rpartition("\n\n")[2].strip()  # the question itself, after the users' texts
        tail = text[text.rindex(last) :] if last and last in text else question.answer_prefix
        key = tail, question.answers
        if key not in self._tries:
            self._tries[key] = AnswerTrie(self.prompts.encode, tail, question.answers)
        return self._tries[key]

    def fits(self, question: Question) -> bool:
        return self.length(question) <= self.max_context

    def length(self, question: Question) -> int:
        """Tokens of the prompt with its longest answer."""
        text = self.text(question)
        prompt = self.prompts.tokens([text])[0]
        return self._trie(question, text).length(prompt) if question.answers else len(prompt)

    def queries(self, questions: Sequence[Question]) -> list[TokenQuery]:
        """What the engine is asked about questions that fit."""
        texts = [self.text(question) for question in questions]
        prompts = self.prompts.tokens(texts)
        return [
            query
            for question, text, prompt in zip(questions, texts, prompts, strict=True)
            for query in self._trie(question, text).queries(prompt)
        ]

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """All at once: the engine takes them as one batch, in which common beginnings are computed once."""
        texts = [self.text(question) for question in questions]
        prompts = self.prompts.tokens(texts)
        tries = [self._trie(question, text) for question, text in zip(questions, texts, strict=True)]
        short = [i for i, prompt in enumerate(prompts) if tries[i].length(prompt) <= self.max_context]
        yield from ((i, Answer((), failure="too_long")) for i in sorted(set(range(len(prompts))) - set(short)))
        queries = [query for i in short for query in tries[i].queries(prompts[i])]
        assert self._generator is not None
        try:
            replies = self._generator.token_logprobs(queries) if queries else []
        except EngineError as error:
            yield from ((i, Answer((), failure=f"engine_error: {shown(str(error))}")) for i in short)
            return
        assert len(replies) == len(queries), "a Generator answers every query"
        taken = 0
        for i in short:
            own = replies[taken : taken + len(tries[i].nodes)]
            taken += len(own)
            failure = next((reply.failure for reply in own if reply.failure is not None), None)
            if failure is not None:
                yield i, Answer((), failure=failure)
            else:
                yield i, self._read(tries[i], [reply.logprobs for reply in own], len(prompts[i]))

    def _read(self, trie: AnswerTrie, logprobs: Sequence[Sequence[float]], tokens_in: int) -> Answer:
        probabilities = trie.probabilities(logprobs)
        total = math.fsum(probabilities)
        cost = self._cost(tokens_in, 0)
        if not (math.isfinite(total) and total > 0.0):
            return Answer((), tokens_in=tokens_in, cost=cost, failure="no_probability")
        return Answer(
            tuple(p / total for p in probabilities), outside=max(0.0, 1.0 - total), tokens_in=tokens_in, cost=cost
        )

    def explain(self, questions: Sequence[Question], settings: GenerationSettings) -> Iterator[tuple[int, Explanation]]:
        """All at once, as one batch."""
        texts = [self.text(question) for question in questions]
        prompts = self.prompts.tokens(texts)
        short = [i for i, p in enumerate(prompts) if len(p) + settings.max_new_tokens <= self.max_context]
        yield from ((i, Explanation((), failure="too_long")) for i in sorted(set(range(len(prompts))) - set(short)))
        # A question's own text is its id: its samples do not depend on what is asked beside it.
        asked = [Prompt(hashlib.sha256(texts[i].encode()).hexdigest(), questions[i].turns, prompts[i]) for i in short]
        assert self._generator is not None
        try:
            completions = self._generator.generate(asked, settings) if asked else []
        except EngineError as error:
            yield from ((i, Explanation((), failure=f"engine_error: {shown(str(error))}")) for i in short)
            return
        count = settings.samples_per_prompt
        for k, i in enumerate(short):
            own = completions[k * count : (k + 1) * count]
            failure = next((c.failure for c in own if c.failure), None)
            if failure is not None:
                yield i, Explanation((), failure=failure)
                continue
            written = sum(len(completion.tokens) for completion in own)
            read = len(prompts[i])
            yield (
                i,
                Explanation(
                    tuple(completion.text.strip() for completion in own),
                    tokens_in=read,
                    tokens_out=written,
                    cost=self._cost(read, written),
                ),
            )

    def _cost(self, tokens_in: int, tokens_out: int) -> float:
        return (tokens_in * self._prices[0] + tokens_out * self._prices[1]) / 1e6


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts that would not be plain text to the judge: special tokens and the role markers of its chat template."""
    template: Any = tokenizer.chat_template or ""
    source = template if isinstance(template, str) else "\n".join(template.values())
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*added, *_TEMPLATE_WORD.findall(source)}))


def as_judge(tokenizer: Any) -> ChatTemplate:
    """A ChatTemplate as it is; a tokenizer as one that does not let the model think before it answers."""
    if isinstance(tokenizer, ChatTemplate):
        return tokenizer
    return ChatTemplate(tokenizer, defaults=WITHOUT_THOUGHTS, key="judge")


def role_heads(tokenizer: Any) -> tuple[str, ...]:
    """Plain words by which the model tells whose turn it is, such as "Human:": () where special tokens do.

    They are read off a conversation as the chat template writes it, between the contents.
    """
    template = ChatTemplate.of(tokenizer)
    if not template.source:
        return ("System:", "User:", "Assistant:")
    marks = [f"\ue000{k}\ue000" for k in range(3)]  # for private use: no template writes them
    roles = ("user", "assistant", "user")
    turns = [Message(role, mark) for role, mark in zip(roles, marks, strict=True)]
    chat = template.text(turns, "a conversation of three messages")
    between = "\n".join(re.split("|".join(marks), chat)[1:])
    return tuple(sorted({head.strip() for head in _HEAD.findall(between)}))


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a plain text, such as a beginning-of-sequence token."""
    bare = tokenizer("1", add_special_tokens=False)["input_ids"]
    full = tokenizer("1", add_special_tokens=True)["input_ids"]
    return list(full[: next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)])
