"""The scripted Generator keeps the contract, and says what it is told to."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from rlaif_ray.errors import EngineError
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.rollout.fake import ScriptedGenerator
from rlaif_ray.types import Completion, Message, Prompt, TokenAnswer, TokenQuery
from tests.contracts.generator import GeneratorContract, Subject
from tests.tiny import VOCABULARY, make_tokenizer

SETTINGS = GenerationSettings(samples_per_prompt=2, max_new_tokens=16, temperature=0.8, seed=0)
HI = Prompt("hi", (Message("user", "hi"),), (75, 76), "hi")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(None)


def made_up_logits(tokens: tuple[int, ...]) -> list[float]:
    """Depends on every token; the end of sequence (2) is likely."""
    source = random.Random(str(tokens))
    return [source.gauss(0, 2) + (3 if token == 2 else 0) for token in range(VOCABULARY)]


@pytest.fixture(scope="module")
def subject(tokenizer: Any) -> Subject:
    generator = ScriptedGenerator(tokenizer, logits=made_up_logits, weight_version=4, max_context=64)
    return Subject(
        generator, tokenizer, 4, 64, lambda tokens: torch.tensor(made_up_logits(tokens), dtype=torch.float64)
    )


class TestContract(GeneratorContract):
    pass


def test_a_scripted_text_is_said_to_its_end(tokenizer: Any) -> None:
    generator = ScriptedGenerator(tokenizer, respond=lambda prompt, i: f"{prompt.text} {i}", weight_version=3)
    completions = generator.generate([HI], SETTINGS)
    assert [c.text for c in completions] == ["hi 0", "hi 1"]
    assert all(c.finished and c.tokens[-1] == 2 and c.weight_version == 3 for c in completions)
    assert completions[0].logprobs == (0.0,) * 5


def test_a_scripted_text_is_cut_at_the_limits(tokenizer: Any) -> None:
    long = ScriptedGenerator(tokenizer, respond=lambda prompt, i: "x" * 99).generate([HI], SETTINGS)[0]
    assert (long.text, long.finished) == ("x" * 16, False)
    exact = ScriptedGenerator(tokenizer, respond=lambda prompt, i: "x" * 16).generate([HI], SETTINGS)[0]
    assert (exact.text, exact.finished) == ("x" * 16, False)
    context = ScriptedGenerator(tokenizer, respond=lambda prompt, i: "x" * 99, max_context=7).generate([HI], SETTINGS)[
        0
    ]
    assert (context.text, context.finished) == ("x" * 5, False)


def test_a_scripted_text_repeats_where_ends_are_ignored(tokenizer: Any) -> None:
    settings = GenerationSettings(1, 7, 1.0, 0, ignore_eos=True)
    [completion] = ScriptedGenerator(tokenizer, respond=lambda prompt, i: "xy").generate([HI], settings)
    assert len(completion.tokens) == 7 and not completion.finished
    assert completion.text == "xyxyx"  # xy, end, xy, end, x


def test_an_empty_answer_is_its_end(tokenizer: Any) -> None:
    completion = ScriptedGenerator(tokenizer, respond=lambda prompt, i: "").generate([HI], SETTINGS)[0]
    assert (completion.tokens, completion.text, completion.finished) == ((2,), "", True)


def test_a_scripted_text_has_the_logprobs_of_the_script(tokenizer: Any) -> None:
    generator = ScriptedGenerator(tokenizer, respond=lambda prompt, i: "x", logits=lambda tokens: {90: 0.25, 2: 0.5})
    settings = GenerationSettings(1, 8, 1.0, 0)
    [completion] = generator.generate([HI], settings)
    assert completion.tokens == (tokenizer.encode("x")[0], 2)
    rest = 0.25 / (VOCABULARY - 2)
    expected = {90: 0.25}.get(completion.tokens[0], rest)
    assert completion.logprobs == pytest.approx((math.log(expected), math.log(0.5)))


def test_a_whole_completion_is_passed_on(tokenizer: Any) -> None:
    given = Completion(HI, 9, (70, 71), (-0.5, -0.25), "ab", False, -5)
    generator = ScriptedGenerator(tokenizer, respond=lambda prompt, i: given, weight_version=2)
    second = generator.generate([HI], SETTINGS)[1]
    assert second == Completion(HI, 1, (70, 71), (-0.5, -0.25), "ab", False, 2)


def test_probabilities_leave_the_rest_to_the_others(tokenizer: Any) -> None:
    generator = ScriptedGenerator(tokenizer, logits=lambda tokens: {19: 0.5, 20: 0.5 - 0.318, 21: 0.0})
    [answer] = generator.token_logprobs([TokenQuery((1,), (19, 20, 21, 22))])
    # 0.318 is spread over the 317 tokens that are not named.
    expected = [0.5, 0.182, 0.0, 0.318 / 317]
    assert [math.exp(logprob) for logprob in answer.logprobs] == pytest.approx(expected)


def test_temperature_0_is_greedy(tokenizer: Any) -> None:
    generator = ScriptedGenerator(tokenizer, logits=lambda tokens: {50: 0.3, 51: 0.4, 52: 0.3})
    [completion] = generator.generate([HI], GenerationSettings(1, 3, 0.0, 0))
    assert completion.tokens == (51, 51, 51)
    assert completion.logprobs == pytest.approx([math.log(0.4)] * 3)


def test_sampling_follows_the_probabilities(tokenizer: Any) -> None:
    generator = ScriptedGenerator(tokenizer, logits=lambda tokens: {50: 0.2, 51: 0.8})
    completions = generator.generate([HI], GenerationSettings(2000, 1, 1.0, 0))
    assert sum(c.tokens == (51,) for c in completions) / 2000 == pytest.approx(0.8, abs=0.03)


def test_failures_are_by_predicate(tokenizer: Any) -> None:
    def failure(asked: Prompt | TokenQuery) -> str | None:
        if isinstance(asked, Prompt):
            return "engine_error" if asked.id == "bad" else None
        return "engine_error" if asked.prompt[0] == 9 else None

    generator = ScriptedGenerator(tokenizer, logits=lambda tokens: {50: 1.0}, failure=failure)
    good, bad = generator.token_logprobs([TokenQuery((8,), (50,)), TokenQuery((9,), (50,))])
    assert good == TokenAnswer((0.0,)) and bad == TokenAnswer((), "engine_error")
    with pytest.raises(EngineError, match="bad"):
        generator.generate([HI, Prompt("bad", (), (1,))], SETTINGS)
    assert len(generator.generate([HI], SETTINGS)) == 2


def test_queries_are_remembered(tokenizer: Any) -> None:
    generator = ScriptedGenerator(tokenizer, logits=lambda tokens: {50: 1.0})
    generator.token_logprobs([TokenQuery((8,), (50,))])
    assert generator.queries == [TokenQuery((8,), (50,))]
