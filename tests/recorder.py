"""A Generator that keeps every prompt it is given and says what it is told to: for tests of what a model reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlaif_ray.feedback.local import LocalAsker
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.types import Completion, Prompt, TokenAnswer, TokenQuery


class Recorder:
    """Writes `say(n)` as the n-th text it is asked for, from 1, and finds all answers equally likely.

    Its texts are given back as they are: a real model, too, can spell out what looks like a control token.
    """

    def __init__(self, tokenizer: Any, say: Callable[[int], str]) -> None:
        self.prompts: list[tuple[int, ...]] = []  # the tokens of every prompt, in order
        self.asker = LocalAsker(self, tokenizer, 10_000_000, "recorder")
        self._tokenizer, self._say, self._said = tokenizer, say, 0

    @property
    def texts(self) -> list[str]:
        """The prompts as the model reads them, control tokens included."""
        return [self._tokenizer.decode(list(tokens)) for tokens in self.prompts]

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Completion]:
        assert settings.samples_per_prompt == 1
        return [self._complete(prompt) for prompt in prompts]

    def _complete(self, prompt: Prompt) -> Completion:
        self.prompts.append(prompt.tokens)
        self._said += 1
        return Completion(prompt, 0, (0,), (0.0,), self._say(self._said), True, 0)

    def token_logprobs(self, queries: Sequence[TokenQuery]) -> list[TokenAnswer]:
        self.prompts += [query.prompt for query in queries]
        return [TokenAnswer((-1.0,) * len(query.candidates)) for query in queries]
