"""A Generator that follows a script: for trying a loop without an engine, and for tests with hand-set numbers.

It passes the contract tests of the real engine (tests/contracts/generator.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlaif_ray.chat.thoughts import thought_tokens, written_text
from rlaif_ray.errors import EngineError
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.rollout.vllm_engine import sample_seed
from rlaif_ray.types import Completion, Prompt, TokenAnswer, TokenQuery

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Respond = Callable[[Prompt, int], "str | Completion"]
NextToken = Callable[[tuple[int, ...]], "Sequence[float] | Mapping[int, float]"]
Failure = Callable[["Prompt | TokenQuery"], "str | None"]


class ScriptedGenerator:
    """Answers from a function instead of a model."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        respond: Respond | None = None,
        logits: NextToken | None = None,
        failure: Failure | None = None,
        weight_version: int = 0,
        max_context: int | None = None,
    ) -> None:
        """At least one of `respond` and `logits`.

        respond: what sample i of a prompt says: a text, or a Completion whose tokens, log-probabilities and end count.
        logits: what follows these tokens: a logit per vocabulary entry, or a mapping from tokens to probabilities
            (what is missing to 1 is spread evenly over all other tokens). Without `respond` it is sampled from.
        failure: the reason why a prompt (EngineError) or a query (an answer with that reason) fails; None for success.
            It may also raise, as an engine that dies.
        max_context: tokens; None for no limit.
        """
        assert respond is not None or logits is not None, "a script needs something to say"
        self._tokenizer = tokenizer
        self._respond = respond
        self._logits = logits
        self._failure = failure
        self._max_context = max_context
        self.weight_version = weight_version
        self.queries: list[TokenQuery] = []  # every query that was asked, in order

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Completion]:
        for prompt in prompts:
            reason = self._why_not(prompt, len(prompt.tokens))
            if reason is not None:
                raise EngineError(f"prompt {prompt.id} failed: {reason}")
        return [
            self._complete(prompt, sample, settings)
            for prompt in prompts
            for sample in range(settings.samples_per_prompt)
        ]

    def token_logprobs(self, queries: Sequence[TokenQuery]) -> list[TokenAnswer]:
        self.queries.extend(queries)
        return [self._answer(query) for query in queries]

    def _answer(self, query: TokenQuery) -> TokenAnswer:
        reason = self._why_not(query, len(query.prompt))
        if reason is not None:
            return TokenAnswer((), reason)
        row = self._next(query.prompt, temperature=1.0)
        return TokenAnswer(tuple(float(row[token]) for token in query.candidates))

    def _why_not(self, asked: Prompt | TokenQuery, tokens: int) -> str | None:
        if self._max_context is not None and tokens >= self._max_context:
            return "too_long"
        return self._failure(asked) if self._failure is not None else None

    def _complete(self, prompt: Prompt, sample: int, settings: GenerationSettings) -> Completion:
        limit = settings.max_new_tokens
        if self._max_context is not None:
            limit = min(limit, self._max_context - len(prompt.tokens))
        answer = self._respond(prompt, sample) if self._respond is not None else None
        if isinstance(answer, Completion):
            return replace(answer, prompt=prompt, sample=sample, weight_version=self.weight_version)
        if answer is None:
            tokens, logprobs = self._sample(prompt, sample, limit, settings)
        else:
            tokens = self._say(answer, limit, settings.ignore_eos)
            logprobs = self._read(prompt.tokens, tokens, settings.temperature)
        return Completion(
            prompt=prompt,
            sample=sample,
            tokens=tokens,
            logprobs=logprobs,
            text=prompt.opened + written_text(self._tokenizer, tokens, thought_tokens(self._tokenizer)),
            finished=not settings.ignore_eos and tokens[-1] == self._tokenizer.eos_token_id,
            weight_version=self.weight_version,
            prompt_logprobs=self._read(prompt.tokens[:1], prompt.tokens[1:], 1.0) if settings.prompt_logprobs else (),
        )

    def _say(self, text: str, limit: int, ignore_eos: bool) -> tuple[int, ...]:
        """The text's tokens and an end, cut at the limit; over and over where ends are ignored."""
        eos = self._tokenizer.eos_token_id
        tokens = [token for token in self._tokenizer.encode(text, add_special_tokens=False) if token != eos] + [eos]
        return tuple(islice(cycle(tokens) if ignore_eos else tokens, limit))

    def _read(self, prompt: tuple[int, ...], tokens: tuple[int, ...], temperature: float) -> tuple[float, ...]:
        """Log-probability of each token; of a mere script 0: it was certain to say this."""
        if self._logits is None:
            return (0.0,) * len(tokens)
        return tuple(
            float(self._next(prompt + tokens[:index], temperature)[token]) for index, token in enumerate(tokens)
        )

    def _sample(
        self, prompt: Prompt, sample: int, limit: int, settings: GenerationSettings
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        random = np.random.default_rng(sample_seed(settings.seed, prompt.id, sample))
        tokens: list[int] = []
        logprobs: list[float] = []
        while len(tokens) < limit:
            row = self._next((*prompt.tokens, *tokens), settings.temperature)
            # The Gumbel-max trick: argmax(log p + Gumbel noise) is distributed as p.
            noise = random.gumbel(size=row.shape) if settings.temperature > 0 else 0.0
            token = int(np.argmax(row + noise))
            tokens.append(token)
            logprobs.append(float(row[token]))
            if token == self._tokenizer.eos_token_id and not settings.ignore_eos:
                break
        return tuple(tokens), tuple(logprobs)

    def _next(self, tokens: tuple[int, ...], temperature: float) -> NDArray[np.float64]:
        """(V,) log-probability of every next token; temperature 0 is greedy and reads as 1, as in vLLM."""
        assert self._logits is not None, "token log-probabilities need `logits`"
        given = self._logits(tokens)
        logits = self._from_mapping(given) if isinstance(given, Mapping) else np.asarray(given, dtype=np.float64)
        scaled = logits / (temperature or 1.0)
        with np.errstate(invalid="ignore"):  # a script may say not-a-number: so can an engine
            return np.asarray(scaled - np.logaddexp.reduce(scaled), dtype=np.float64)

    def _from_mapping(self, given: Mapping[int, float]) -> NDArray[np.float64]:
        vocabulary = len(self._tokenizer)
        rest = max(0.0, 1.0 - sum(given.values())) / max(1, vocabulary - len(given))
        row = np.full(vocabulary, rest)
        row[list(given)] = list(given.values())
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(row), dtype=np.float64)
