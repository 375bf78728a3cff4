"""What every Generator must do, the real engine and the scripted one alike.

A test module subclasses GeneratorContract and gives the fixture `subject`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from rlaif_ray.interfaces import GenerationSettings, Generator
from rlaif_ray.types import Completion, Message, Prompt, TokenQuery

SETTINGS = GenerationSettings(samples_per_prompt=3, max_new_tokens=12, temperature=1.0, seed=7)
TEXTS = ("which answer is better", "a", "the question is 12 + 30, and you help", "Grüße 你好", "harm\n\n[END]")


@dataclass(frozen=True)
class Subject:
    """A Generator and what is known about it."""

    generator: Generator
    tokenizer: Any
    weight_version: int
    max_context: int
    next_logits: Callable[[tuple[int, ...]], torch.Tensor]  # (V,) by other means than the generator


def prompts_for(tokenizer: Any) -> list[Prompt]:
    return [
        Prompt(str(i), (Message("user", text),), tuple(tokenizer.encode(text, add_special_tokens=False)), text)
        for i, text in enumerate(TEXTS)
    ]


def reference_logprobs(subject: Subject, completion: Completion, temperature: float) -> list[float]:
    """Log-probability of each sampled token."""
    return [
        float(
            torch.log_softmax(subject.next_logits(completion.prompt.tokens + completion.tokens[:i]) / temperature, -1)[
                t
            ]
        )
        for i, t in enumerate(completion.tokens)
    ]


class GeneratorContract:
    """The tests; `subject` comes from the subclass's module."""

    @pytest.fixture
    def prompts(self, subject: Subject) -> list[Prompt]:
        return prompts_for(subject.tokenizer)

    def test_order_is_kept_with_samples_side_by_side(self, subject: Subject, prompts: list[Prompt]) -> None:
        completions = subject.generator.generate(prompts, SETTINGS)
        assert [(c.prompt, c.sample) for c in completions] == [(p, i) for p in prompts for i in range(3)]
        assert subject.generator.generate([], SETTINGS) == []

    def test_a_completion_is_whole(self, subject: Subject, prompts: list[Prompt]) -> None:
        for completion in subject.generator.generate(prompts, SETTINGS):
            assert 1 <= len(completion.tokens) == len(completion.logprobs) <= SETTINGS.max_new_tokens
            assert completion.text == subject.tokenizer.decode(list(completion.tokens), skip_special_tokens=True)
            assert completion.weight_version == subject.weight_version

    @pytest.mark.parametrize("temperature", [0.7, 1.0])
    def test_logprobs_are_of_the_sampling_distribution(
        self, subject: Subject, prompts: list[Prompt], temperature: float
    ) -> None:
        settings = replace(SETTINGS, temperature=temperature, max_new_tokens=6, samples_per_prompt=2)
        for completion in subject.generator.generate(prompts, settings):
            assert max(completion.logprobs) <= 0.0
            assert completion.logprobs == pytest.approx(reference_logprobs(subject, completion, temperature), abs=1e-4)

    def test_prompt_logprobs_are_the_models_own_at_any_temperature(
        self, subject: Subject, prompts: list[Prompt]
    ) -> None:
        settings = replace(SETTINGS, temperature=0.7, samples_per_prompt=2, prompt_logprobs=True)
        plain = subject.generator.generate(prompts, replace(settings, prompt_logprobs=False))
        found = subject.generator.generate(prompts, settings)
        assert [c.tokens for c in found] == [c.tokens for c in plain]  # reading them changes nothing
        assert all(c.prompt_logprobs == () for c in plain)
        for completion in found:
            tokens = completion.prompt.tokens
            expected = [
                float(torch.log_softmax(subject.next_logits(tokens[:i]), -1)[tokens[i]]) for i in range(1, len(tokens))
            ]
            assert completion.prompt_logprobs == pytest.approx(expected, abs=1e-4)

    def test_a_seed_gives_its_tokens_in_any_batch(self, subject: Subject, prompts: list[Prompt]) -> None:
        tokens = [c.tokens for c in subject.generator.generate(prompts, SETTINGS)]
        assert [c.tokens for c in subject.generator.generate(prompts, SETTINGS)] == tokens
        alone = subject.generator.generate([prompts[3]], replace(SETTINGS, samples_per_prompt=2))
        assert [c.tokens for c in alone] == tokens[9:11]
        backwards = subject.generator.generate(prompts[::-1], SETTINGS)
        assert [c.tokens for c in backwards[:3]] == tokens[-3:]

    def test_samples_and_seeds_differ(self, subject: Subject, prompts: list[Prompt]) -> None:
        settings = replace(SETTINGS, samples_per_prompt=4, ignore_eos=True)
        tokens = [c.tokens for c in subject.generator.generate(prompts[:1], settings)]
        assert len(set(tokens)) == 4
        assert [c.tokens for c in subject.generator.generate(prompts[:1], replace(settings, seed=8))] != tokens

    def test_finished_means_end_of_sequence(self, subject: Subject, prompts: list[Prompt]) -> None:
        eos = subject.tokenizer.eos_token_id
        completions = subject.generator.generate(prompts, replace(SETTINGS, samples_per_prompt=60, temperature=1.5))
        for completion in completions:
            assert completion.finished == (completion.tokens[-1] == eos)
            assert eos not in completion.tokens[:-1]
            assert completion.finished or len(completion.tokens) == SETTINGS.max_new_tokens
        assert {completion.finished for completion in completions} == {True, False}

    def test_ignoring_the_end_gives_the_exact_length(self, subject: Subject, prompts: list[Prompt]) -> None:
        settings = replace(SETTINGS, ignore_eos=True, temperature=1.5, samples_per_prompt=20)
        completions = subject.generator.generate(prompts, settings)
        assert {(len(c.tokens), c.finished) for c in completions} == {(SETTINGS.max_new_tokens, False)}

    def test_a_batch_may_hold_more_tokens_than_an_engine_takes_at_once(self, subject: Subject) -> None:
        """Engines then read some prompts in parts."""
        size = subject.max_context // 5 * 2
        long = [Prompt(f"long {i}", (), (40 + i,) * size) for i in range(4)]
        settings = replace(SETTINGS, samples_per_prompt=1, max_new_tokens=4)
        tokens = [c.tokens for c in subject.generator.generate(long, settings)]
        assert [subject.generator.generate([prompt], settings)[0].tokens for prompt in long] == tokens
        answers = subject.generator.token_logprobs([TokenQuery(prompt.tokens, (19,)) for prompt in long])
        assert [answer.failure for answer in answers] == [None] * 4

    def test_token_logprobs_are_of_the_full_vocabulary(self, subject: Subject, prompts: list[Prompt]) -> None:
        queries = [TokenQuery(p.tokens, (19, 5, 2, 300)[: 1 + i % 4]) for i, p in enumerate(prompts)]
        queries += [TokenQuery((*q.prompt, 19), (18,)) for q in queries]  # each shares a prefix with one before
        answers = subject.generator.token_logprobs(queries)
        assert [a.failure for a in answers] == [None] * len(queries)
        for query, answer in zip(queries, answers, strict=True):
            expected = torch.log_softmax(subject.next_logits(query.prompt), -1)[list(query.candidates)]
            assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
        assert subject.generator.token_logprobs([]) == []

    def test_a_query_that_fails_fails_alone(self, subject: Subject, prompts: list[Prompt]) -> None:
        good = TokenQuery(prompts[0].tokens, (19, 20))
        fits = TokenQuery((40,) * (subject.max_context - 1), (19,))
        long = TokenQuery((40,) * subject.max_context, (19,))
        first, middle, last, longest = subject.generator.token_logprobs([good, long, good, fits])
        assert middle.failure == "too_long" and middle.logprobs == ()
        assert first.failure is last.failure is longest.failure is None
        assert first.logprobs == pytest.approx(last.logprobs, abs=1e-5)
