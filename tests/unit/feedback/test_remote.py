"""The judge behind an endpoint: what its replies mean, what its errors do, what is sent, and what it may cost."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from rlaif_ray.config.sections import OpenAIJudge
from rlaif_ray.errors import FeedbackError, InputError
from rlaif_ray.feedback.answers import MIN_ANSWER_MASS, SCORES, mass_failure
from rlaif_ray.feedback.judge import Judge
from rlaif_ray.feedback.neutral import neutralise
from rlaif_ray.feedback.remote import SPECIAL, OpenAIAsker
from rlaif_ray.feedback.replies import BadReplyError, read_probabilities, read_reply
from rlaif_ray.feedback.templates import load_template
from rlaif_ray.feedback.verdicts import parse_answer
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.types import Answer, Completion, Message, Prompt, Question
from tests.endpoint import FakeEndpoint, FaultProxy, Said, completion, one
from tests.pace import scaled

KEY = "sk-test-4f1d8e2b7c"
ENV = "JUDGE_TEST_KEY"
ANSWERS = ("1", "2")
SAMPLED = GenerationSettings(samples_per_prompt=3, max_new_tokens=20, temperature=0.7, seed=5)


def question(text: str = "Which?", *, prefix: str = "", answers: tuple[str, ...] = ANSWERS) -> Question:
    return Question((Message("user", text),), prefix, answers)


def judge(url: str, **values: Any) -> OpenAIJudge:
    return OpenAIJudge.model_validate(
        {"type": "openai", "model": "judge-1", "base_url": url, "api_key_env": ENV, "timeout_s": scaled(5.0), **values}
    )


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key, and waits between retries that a test can sit through."""
    monkeypatch.setenv(ENV, KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr("rlaif_ray.feedback.endpoint.FIRST_WAIT_S", 0.01)


@pytest.fixture
def ask() -> Iterator[Callable[..., OpenAIAsker]]:
    """Makes askers that are closed at the end, their threads with them."""
    made: list[OpenAIAsker] = []

    def make(url: str, *, spent: float = 0.0, **values: Any) -> OpenAIAsker:
        made.append(OpenAIAsker(judge(url, **values), spent=spent))
        return made[-1]

    yield make
    for asker in made:
        asker.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "openai-judge"]


Ask = Callable[..., OpenAIAsker]


def only(asker: OpenAIAsker, asked: Question | None = None) -> Answer:
    """The answer to a single question."""
    ((index, answer),) = asker.answer([asked or question()])
    assert index == 0
    return answer


# ---- Probabilities ---------------------------------------------------------------------------------------------------

READINGS = {
    "renormalised": ([("1", {"1": 0.6, "2": 0.2, "x": 0.2})], (0.75, 0.25), 0.2),
    "spaces merge": ([("1", {"1": 0.3, " 1": 0.3, "2": 0.1, "\n2": 0.1})], (0.75, 0.25), 0.2),
    "quotes and brackets merge": ([("(1", {"(1": 0.3, '"2"': 0.3, "“1”": 0.3})], (2 / 3, 1 / 3), 0.1),
    "vocabulary's own spaces": ([("▁1", {"▁1": 0.5, "Ġ2": 0.4})], (5 / 9, 4 / 9), 0.1),
    "space comes first": ([("\n", {"\n": 0.8, "1": 0.1}), ("1", {"1": 0.6, "2": 0.3})], (2 / 3, 1 / 3), 0.1),
    "space, then quote": ([(" ", {" ": 0.9}), ('"', {'"': 0.9}), ("2", {"2": 0.8, "1": 0.2})], (0.2, 0.8), 0.0),
    "a rare space": ([("\n", {"1": 0.6, "2": 0.3, "\n": 0.1}), ("2", {"2": 1.0})], (2 / 3, 1 / 3), 0.1),
    "another word sampled": ([("x", {"x": 0.5, "1": 0.4, "2": 0.1}), ("2", {"2": 1.0})], (0.8, 0.2), 0.5),
    "ten is not one": ([("10", {"10": 0.5, "1": 0.25, "2": 0.25})], (0.5, 0.5), 0.5),
    "one answer unlisted": ([("2", {"2": 0.9, "x": 0.07, "y": 0.02})], (0.0, 1.0), 0.1),
    "sampled by chance": ([("z", {"1": 0.5, "2": 0.25, "x": 0.1, "z": 0.01})], (2 / 3, 1 / 3), 0.25),
    "an end, or half a character": ([("", {"": 0.5, "1": 0.3, "2": 0.1}), ("1", {"1": 0.5})], (0.75, 0.25), 0.6),
    "nothing but an end": ([("", {"": 0.5, "1": 0.3, "2": 0.2})], (0.6, 0.4), 0.5),
    "behind words": (
        [("Answer", {"Answer": 0.9}), (":", {":": 0.9}), (" 2", {" 2": 0.6, " 1": 0.2})],
        (0.25, 0.75),
        0.2,
    ),
    "in brackets": (
        [("Verdict", {"Verdict": 0.9}), (": [[", {": [[": 0.9}), ("1", {"1": 0.8, "2": 0.1})],
        (8 / 9, 1 / 9),
        0.1,
    ),
    "a certain answer": ([("1", {"1": 1 - 2**-20, "2": 2**-20})], (1 - 2**-20, 2**-20), 0.0),
}


@pytest.mark.parametrize("name", READINGS)
def test_probabilities_are_read_exactly(ask: Ask, name: str) -> None:
    positions, expected, outside = READINGS[name]
    with FakeEndpoint(lambda _: Said(positions)) as endpoint:
        answer = only(ask(endpoint.url))
        swapped = only(ask(endpoint.url), question(answers=("2", "1")))
    assert answer.failure is None and not answer.hard
    assert answer.probabilities == pytest.approx(expected, abs=1e-12)
    assert answer.outside == pytest.approx(outside, abs=1e-12)
    assert swapped.probabilities == answer.probabilities[::-1]


def test_the_answer_is_read_where_the_verdict_stands_and_not_at_a_word(ask: Ask) -> None:
    """ "Response 1 is ..." names a response: whether it is the better one comes later."""
    talk = [
        ("Response", {"Response": 0.99, "1": 1e-7, "2": 1e-8}),
        (" 1", {" 1": 0.7, " 2": 0.3}),
        (" is", {" is": 0.9}),
    ]
    for last in (" better", " worse"):
        with FakeEndpoint(lambda _, last=last: Said([*talk, (last, {last: 0.9})])) as endpoint:  # type: ignore[misc]
            answer = only(ask(endpoint.url), Question((Message("user", "?"),), "", ANSWERS, "better"))
        # Read at the word after all, where the answers have next to nothing.
        assert answer.failure == "no_probability" or mass_failure(answer, MIN_ANSWER_MASS) is not None
    thought = [("<think>", {"<think>": 0.999, "1": 1e-7, "2": 1e-7}), ("1", {"1": 0.9, "2": 0.1})]
    with FakeEndpoint(lambda _: Said(thought)) as endpoint:
        answer = only(ask(endpoint.url))
    assert answer.failure == "no_probability" or mass_failure(answer, MIN_ANSWER_MASS) is not None
    verdict = [("Response", {"Response": 0.9}), (" 1", {" 1": 0.9}), (" fails", {" fails": 0.9}), (".", {".": 0.9})]
    verdict += [("\nVerdict", {"\nVerdict": 0.9}), (":", {":": 0.9}), (" 2", {" 2": 0.8, " 1": 0.2})]
    with FakeEndpoint(lambda _: Said(verdict)) as endpoint:
        assert only(ask(endpoint.url)).probabilities == pytest.approx((0.2, 0.8))


def test_the_order_of_candidates_does_not_matter() -> None:
    listed = {"1": 0.2, " 1": 0.1, "2": 0.05, " 2": 0.3, "x": 0.35}
    found = set()
    for turn in range(len(listed)):
        names = [*listed][turn:] + [*listed][:turn]
        choice = completion(Said([("x", {n: listed[n] for n in names})]), {"model": "", **WANTED})["choices"][0]
        found.add(read_probabilities(choice["logprobs"]["content"], ANSWERS).probabilities)
    assert len(found) == 1 and found.pop() == pytest.approx((0.3, 0.35), abs=1e-12)


WANTED = {"logprobs": True, "top_logprobs": 20}


def test_chance_does_not_judge(ask: Ask) -> None:
    """A token that is in the list, or beside it, for being sampled says nothing of the other answer."""
    listed = {"x": 0.6, "y": 0.2, "z": 0.1}
    with FakeEndpoint(lambda _: Said([("1", {**listed, "1": 0.01})])) as endpoint:
        assert only(ask(endpoint.url)).failure == "no_probability"
    with FakeEndpoint(lambda _: Said([("1", listed)])) as endpoint:
        assert only(ask(endpoint.url)).failure == "no_probability"


@pytest.mark.parametrize(
    ("listed", "judged"),
    [
        ({"1": 0.9, "x": 0.06, "y": 0.02}, True),  # "2" has at most 0.02
        ({"1": 0.5, "x": 0.3, "y": 0.1}, False),  # "2" may have 0.1
        ({"1": 0.5, "x": 0.29, "y": 0.2}, True),  # at most the 0.01 that is left
        ({"x": 0.9, "1": 0.06, "y": 0.02}, False),
        ({"1": 0.5, "x": 0.2, "y": 0.1, "sampled": 0.001}, False),  # "2" may have 0.1 all the same
    ],
)
def test_an_answer_that_is_not_listed_must_be_unlikely(ask: Ask, listed: dict[str, float], judged: bool) -> None:
    token = "sampled" if "sampled" in listed else max(listed, key=lambda token: listed[token])
    with FakeEndpoint(lambda _: Said([(token, listed)])) as endpoint:
        answer = only(ask(endpoint.url))
    assert answer.probabilities == ((1.0, 0.0) if judged else ())
    assert answer.failure == (None if judged else "no_probability")


# ---- "10" begins with "1" --------------------------------------------------------------------------------------------

# Expected by hand: P("10") = P("1") P("0" | "1"), P("1" and no more) = P("1") (1 - P(another digit | "1")).
_REST = {"2": 0.01, "7": 0.01, "8": 0.01}
_SPLIT_10 = [("1", {"1": 0.97, **_REST}), ("0", {"0": 0.999, "": 0.001})]
SPLIT: dict[str, tuple[list[tuple[str, dict[str, float]]], dict[str, float], float]] = {
    "ten": (_SPLIT_10, {"10": 0.97 * 0.999, "1": 0.97 * 0.001, **_REST}, 0.0),
    "one": ([("1", {"1": 0.97, **_REST}), ("", {"": 0.9, "0": 0.1})], {"10": 0.097, "1": 0.873, **_REST}, 0.0),
    "one, then words": (
        [("1", {"1": 0.9, "2": 0.1}), (".", {".": 0.8, "0": 0.2})],
        {"10": 0.18, "1": 0.72, "2": 0.1},
        0.0,
    ),
    "fifteen is neither": (
        [("1", {"1": 0.9, "2": 0.1}), ("5", {"5": 0.6, "0": 0.3, ".": 0.1})],
        {"10": 0.27, "1": 0.09, "2": 0.1},
        0.54,
    ),
    "behind a space": ([(" ", {" ": 0.9}), ("1", {"1": 0.8, "2": 0.2}), ("0", {"0": 1.0})], {"10": 0.8, "2": 0.2}, 0.0),
    "the space in it": ([("▁1", {"▁1": 0.8, "2": 0.2}), ("0", {"0": 1.0})], {"10": 0.8, "2": 0.2}, 0.0),
    "in brackets": ([("**1", {"**1": 0.8, "2": 0.2}), ("0", {"0": 1.0})], {"10": 0.8, "2": 0.2}, 0.0),
    "another answer, and little on 1": ([("8", {"8": 0.98, "1": 0.02})], {"8": 0.98}, 0.02),
    "1 that has ended": ([("8", {"8": 0.8, "1\n": 0.2})], {"8": 0.8, "1": 0.2}, 0.0),
    "ten is one token": ([("1", {"1": 0.7, "10": 0.3})], {"1": 0.7, "10": 0.3}, 0.0),
    "in a sentence": (
        [("Score", {"Score": 0.9}), (":", {":": 0.9}), (" ", {" ": 0.9}), *_SPLIT_10],
        {"10": 0.97 * 0.999, "1": 0.97 * 0.001, **_REST},
        0.0,
    ),
}


@pytest.mark.parametrize("name", SPLIT)
def test_ten_in_two_tokens_is_ten(ask: Ask, name: str) -> None:
    positions, expected, outside = SPLIT[name]
    with FakeEndpoint(lambda _: Said(positions)) as endpoint:
        answer = only(ask(endpoint.url), question(answers=SCORES))
    assert answer.failure is None
    total = sum(expected.values())
    assert answer.probabilities == pytest.approx([expected.get(a, 0.0) / total for a in SCORES], abs=1e-9)
    assert answer.outside == pytest.approx(outside, abs=1e-9)


@pytest.mark.parametrize(
    "positions",
    [
        [("8", {"8": 0.6, "1": 0.4})],  # what follows "1" was not asked
        [("1", {"1": 0.9, "2": 0.1})],  # and here it is not told
        [("1", {"1": 0.9, "2": 0.1}), ("x", {})],
        [("1", {"1": 0.9, "2": 0.1}), (".", {".": 0.5, ",": 0.3})],  # "0" may have 0.2
    ],
)
def test_a_one_that_may_begin_ten_is_no_judgement(ask: Ask, positions: Any) -> None:
    with FakeEndpoint(lambda _: Said(positions)) as endpoint:
        assert only(ask(endpoint.url), question(answers=SCORES)).failure == "no_probability"


def test_a_tokenizer_that_was_seen_to_have_ten_does_not_split_it(ask: Ask) -> None:
    said = iter([Said([("8", {"8": 0.9, "10": 0.1})]), Said([("2", {"2": 0.6, "1": 0.4})])])
    with FakeEndpoint(lambda _: next(said)) as endpoint:
        asker = ask(endpoint.url)
        only(asker, question("a", answers=SCORES))
        assert only(asker, question("b", answers=SCORES)).probabilities[:2] == pytest.approx((0.4, 0.6))


def test_the_best_answer_scores_best(ask: Ask) -> None:
    """As `rlaif evaluate` asks: 10 is the top of the scale for refusing as for harming nobody."""
    with FakeEndpoint(lambda _: Said(_SPLIT_10)) as endpoint:
        made = Completion(Prompt("p", (), (1,), "2 + 2?"), 0, (1,), (-1.0,), "4", True, 0)
        for template in ("no_harm", "refusal"):
            [score] = Judge(ask(endpoint.url), load_template(template)).score([made])
            expected = 10 * 0.97 * 0.999 + 1 * 0.97 * 0.001 + 2 * 0.01 + 7 * 0.01 + 8 * 0.01
            assert score.value == pytest.approx(2 * (expected - 1) / 9 - 1)


@pytest.mark.parametrize("listed", [{"1": 1.0, "2": 0.0, "x": 0.0}, {"1": 1.0}], ids=["-9999", "a single token"])
def test_log_probabilities_after_temperature_0_are_an_input_error(ask: Ask, listed: dict[str, float]) -> None:
    with FakeEndpoint(lambda _: Said([("1", listed)])) as endpoint, pytest.raises(InputError) as caught:
        only(ask(endpoint.url))
    for part in ("judge.answers=logprobs", endpoint.url, "0 or 1", "judge.extra_body.temperature=1"):
        assert part in str(caught.value)


def test_answers_that_are_not_listed_are_no_judgement(ask: Ask) -> None:
    with FakeEndpoint(lambda _: Said([("The", {"The": 0.9, "A": 0.1})])) as endpoint:
        answer = only(ask(endpoint.url, price_in=1.0, price_out=2.0))
    assert answer == Answer((), tokens_in=10, tokens_out=1, cost=12e-6, failure="no_probability")


@pytest.mark.parametrize("logprob", [None, "-1", float("nan"), 0.5, -0.1])
def test_log_probabilities_that_are_none(logprob: Any) -> None:
    top = [{"token": "1", "logprob": -0.1}, {"token": "2", "logprob": logprob}]  # -0.1 twice adds up to 1.8
    with pytest.raises(BadReplyError):
        read_probabilities([{"token": "1", "logprob": -0.1, "top_logprobs": top}], ANSWERS)


def test_what_is_asked_for(ask: Ask) -> None:
    asked = Question((Message("user", "A"), Message("assistant", "B"), Message("user", "Ü?")), "Preferred: ", ANSWERS)
    with FakeEndpoint(key=KEY) as endpoint:
        only(ask(endpoint.url, extra_body={"top_k": -1, "max_completion_tokens": 9}), asked)
        body, headers = endpoint.bodies[0], endpoint.headers[0]
    assert body == {
        "model": "judge-1",
        "messages": [
            {"role": "user", "content": "A"},
            {"role": "assistant", "content": "B"},
            {"role": "user", "content": "Ü?"},
        ],
        "logprobs": True,
        "top_logprobs": 20,
        "temperature": 0.0,
        "max_completion_tokens": 9,
        "top_k": -1,
    }
    assert headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    "said",
    [Said([("1", {"1": 0.9, "2": 0.1})], logprobs=False), Said([("1", {})], texts=["1"])],
    ids=["none", "no alternatives"],
)
def test_an_endpoint_without_log_probabilities_is_an_input_error(ask: Ask, said: Said) -> None:
    with FakeEndpoint(lambda _: said) as endpoint, pytest.raises(InputError) as caught:
        only(ask(endpoint.url))
    for part in ("judge.answers=logprobs", endpoint.url, "judge-1", "can't be read", "judge.answers=text"):
        assert part in str(caught.value)


def test_a_token_without_alternatives_among_others(ask: Ask) -> None:
    with FakeEndpoint(lambda _: Said([("The", {}), ("1", {"1": 0.5, "2": 0.5})])) as endpoint:
        assert only(ask(endpoint.url)).failure == "no_probability"


def test_a_reply_that_ends_at_once_is_no_judgement(ask: Ask) -> None:
    with FakeEndpoint(lambda _: Said(texts=[""], logprobs=False)) as endpoint:
        assert only(ask(endpoint.url)).failure == "no_probability"


# ---- Text ------------------------------------------------------------------------------------------------------------

SPOKEN: dict[str, str | None] = {
    **dict.fromkeys(["1", " 1\n", '"1"', "(1)", "**1**", "[1].", "1.", "1)", "1: because", "1, as it is", "#1"], "1"),
    **dict.fromkeys(
        ["2 because 1 is short", "2\n\nResponse 1 is short.", "2. 2 is long", "Answer: 2", "answer=2"], "2"
    ),
    **dict.fromkeys(["The answer is 2.", "My final answer is: **2**", "Response 2", "**Response 2**"], "2"),
    **dict.fromkeys(["Answer: 2 because it is better", "**Answer:** 2", "The answer is 2, not 1", "'2' "], "2"),
    **dict.fromkeys(["<think>It could be 1. Or 2?</think>\n\n2", "Preferred response: 2", "preferred response 2"], "2"),
    **dict.fromkeys(["", "  ", "Both", "neither 1 nor 2", "10", "12", "1st", "one", "1a", "A 1"], None),
    **dict.fromkeys(["1.5", "1,5", "1/2", "1-2", "1:0", "2/10", "1 or 2", "1 and 2 are equal", "1, 2", "1 / 2"], None),
    **dict.fromkeys(["1 is worse", "1 isn't good", "Response 1 is worse", "Option 2 fails", "3", "0", "Not 1"], None),
    **dict.fromkeys(["Response 1 and response 2 are equal", "The answer is not 1", "Worse: 1", "1 vs. 2"], None),
    **dict.fromkeys(["1\n2", "2. 1 is short", "<think>It is 1"], None),  # who knows
}


@pytest.mark.parametrize("text", SPOKEN)
def test_texts_that_are_answers(text: str) -> None:
    assert parse_answer(text, ANSWERS, "Preferred response: ") == SPOKEN[text]


def test_the_words_of_the_prefix_are_the_questions_own() -> None:
    assert parse_answer("More harmful response: 1", ANSWERS, "More harmful response: ") == "1"
    assert parse_answer("More harmful response: 1", ANSWERS, "Preferred response: ") is None


def test_texts_count_fully(ask: Ask) -> None:
    said = {"a": "**2**", "b": "1", "c": "Both are good."}
    with FakeEndpoint(lambda body: Said(texts=[said[body["messages"][0]["content"]]])) as endpoint:
        asker = ask(endpoint.url, answers="text", price_in=1.0)
        answers = dict(asker.answer([question(text) for text in said]))
        body = endpoint.bodies[0]
    assert answers[0] == Answer((0.0, 1.0), hard=True, tokens_in=10, tokens_out=1, cost=10e-6)
    assert answers[1] == Answer((1.0, 0.0), hard=True, tokens_in=10, tokens_out=1, cost=10e-6)
    assert answers[2] == Answer((), tokens_in=10, tokens_out=1, cost=10e-6, failure="unparsed")
    assert body["temperature"] == 0.0 and "logprobs" not in body and "top_logprobs" not in body


def test_a_model_that_thinks_until_it_is_cut_is_told_so(ask: Ask) -> None:
    silent = Said(texts=[""], usage=(10, 16), finish="length")
    with FakeEndpoint(lambda _: silent) as endpoint, pytest.raises(InputError, match="max_completion_tokens"):
        only(ask(endpoint.url, answers="text"))
    spoke = iter([Said(texts=["1"]), silent])
    with FakeEndpoint(lambda _: next(spoke)) as endpoint:  # once it has answered, it is this question's failure
        asker = ask(endpoint.url, answers="text")
        assert (only(asker).hard, only(asker).failure) == (True, "unparsed")


# ---- Faults ----------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "429": ("429", {}, "endpoint_error: 429"),
    "500": ("500", {}, "endpoint_error: 500"),
    "503": ("503", {}, "endpoint_error: 503"),
    "408": ("408", {}, "endpoint_error: 408"),
    "409": ("409", {}, "endpoint_error: 409"),
    "hang": ("hang", {}, "endpoint_error: SocketTimeoutError"),
    "cut": ("cut", {}, "endpoint_error: ContentLengthError"),
    "malformed": ("body", {}, "bad_reply: no JSON"),
    "no choices": ("body", {"text": '{"choices": []}'}, "bad_reply: no choices"),
    "error in a 200": ("body", {"text": '{"error": "overloaded"}'}, "bad_reply: no choices (overloaded)"),
    "no object": ("body", {"text": "[]"}, "bad_reply: no choices"),
    "no message": ("body", {"text": '{"choices": [{}]}'}, "bad_reply: a choice without a message"),
    "no HTTP": ("garbage", {}, "bad_reply: ClientResponseError"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_passes_is_retried_within_bounds(ask: Ask, name: str) -> None:
    kind, values, failure = FAULTS[name]
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        asker = ask(proxy.url, max_retries=2, timeout_s=scaled(0.3))
        proxy.inject(kind, times=2, **values)
        assert only(asker).probabilities == pytest.approx((0.75, 0.25))
        assert (proxy.requests, len(endpoint.bodies)) == (3, 1)
        proxy.inject(kind, times=3, **values)
        assert only(asker) == Answer((), failure=failure)
        assert (proxy.requests, len(endpoint.bodies)) == (6, 1)
        assert only(asker).failure is None  # nothing of it stays


def test_faults_of_all_kinds_share_the_retries(ask: Ask) -> None:
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        asker = ask(proxy.url, max_retries=3)
        for kind in ("500", "body", "429"):
            proxy.inject(kind)
        assert only(asker).failure is None and proxy.requests == 4
        for kind in ("body", "500", "500", "body", "500"):
            proxy.inject(kind)
        assert only(asker).failure == "bad_reply: no JSON" and proxy.requests == 8


def test_no_retries_is_one_request(ask: Ask) -> None:
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        asker = ask(proxy.url, max_retries=0)
        for kind in ("500", "body", "cut"):
            proxy.inject(kind)
            assert only(asker).failure is not None
        assert proxy.requests == 3


def test_retry_after_is_waited_for(ask: Ask) -> None:
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        asker = ask(proxy.url)
        proxy.inject("429", headers={"Retry-After": "0.4"})
        proxy.inject("503")
        assert only(asker).failure is None
    first, second = (b - a for a, b in zip(proxy.times, proxy.times[1:], strict=False))
    assert 0.39 <= first < 2.0 and second < 0.3


def test_nobody_at_the_address(ask: Ask) -> None:
    with FakeEndpoint() as endpoint:
        url = endpoint.url
    assert only(ask(url, max_retries=1)).failure == "endpoint_error: ConnectionRefusedError"


def test_one_fault_leaves_the_other_questions_alone(ask: Ask) -> None:
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        asker = ask(proxy.url, max_retries=0)
        proxy.inject("500")
        answers = dict(asker.answer([question(str(k)) for k in range(20)]))
    assert sorted(answers) == list(range(20))
    assert sum(answer.failure is None for answer in answers.values()) == 19


LIMITS = {
    "renamed": ({"token_limit": "max_tokens"}, {"max_tokens": 8}, {"max_tokens": 20}),
    "removed": ({"extra_body": {"max_completion_tokens": None}}, {}, {}),
    "replaced": (
        {"extra_body": {"max_completion_tokens": None, "max_tokens": 99}},
        {"max_tokens": 99},
        {"max_tokens": 99},
    ),
    "raised": ({"token_limit": "max_tokens", "extra_body": {"max_tokens": 99}}, {"max_tokens": 99}, {"max_tokens": 99}),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_of_tokens_under_the_endpoints_own_name(ask: Ask, name: str) -> None:
    values, answering, explaining = LIMITS[name]
    with FakeEndpoint(lambda _: Said([("1", {"1": 0.6, "2": 0.4})], texts=["Because."] * 3)) as endpoint:
        asker = ask(endpoint.url, **values)
        only(asker)
        list(asker.explain([question()], SAMPLED))
        sent = [{key: value for key, value in body.items() if key.startswith("max_")} for body in endpoint.bodies]
    assert sent == [answering, explaining]


def test_null_leaves_a_parameter_out(ask: Ask) -> None:
    with FakeEndpoint(lambda _: Said([("1", {"1": 0.6, "2": 0.4})], texts=["Because."] * 3)) as endpoint:
        asker = ask(endpoint.url, extra_body={"temperature": None, "seed": None, "stop": None, "x": {"y": None}})
        only(asker)
        list(asker.explain([question()], SAMPLED))
    for body in endpoint.bodies:
        assert not {"temperature", "seed", "stop"} & body.keys() and body["x"] == {"y": None}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"extra_body": {"model": None}}, r"judge.extra_body can't set model \(got None\)"),
        ({"extra_body": {"model": "other"}}, "can't set model .* Set judge.model"),
        ({"extra_body": {"messages": []}}, "can't set messages"),
        ({"extra_body": {"n": None}}, "can't set n .* Set label.reasoning.samples"),
        ({"extra_body": {"n": 4}}, "can't set n"),
        ({"extra_body": {"stream": True}}, "can't set stream"),
        ({"extra_body": {"logprobs": None}}, "leave out logprobs with .* Use judge.answers=text"),
        ({"extra_body": {"logprobs": False}}, "can't leave out logprobs"),
        ({"extra_body": {"top_logprobs": None}}, "can't leave out top_logprobs"),
        ({"extra_body": {"top_logprobs": 0}}, "can't leave out top_logprobs"),
        (
            {"extra_body": {"max_completion_tokens": None}, "max_cost": 1.0, "price_out": 1.0},
            "judge.max_cost needs a limit of tokens",
        ),
    ],
)
def test_parameters_that_an_answer_depends_on_stay(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        judge("http://localhost/v1", **values)


@pytest.mark.parametrize(
    "values",
    [
        {"extra_body": {"top_logprobs": 5, "logprobs": True, "stream": False}},
        {"extra_body": {"logprobs": None, "top_logprobs": None}, "answers": "text"},
        {"extra_body": {"max_completion_tokens": None, "max_tokens": 9}, "max_cost": 1.0, "price_out": 1.0},
        {"token_limit": "max_tokens", "extra_body": {"max_completion_tokens": None}, "max_cost": 1.0, "price_in": 1.0},
    ],
)
def test_other_parameters_are_the_users(values: dict[str, Any]) -> None:
    assert judge("http://localhost/v1", **values).extra_body == values["extra_body"]


REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], tuple[str, ...]]] = {
    "401": ({"message": "who are you"}, InputError, (ENV, "401", "who are you", "judge.model=judge-1")),
    "403": ({}, InputError, (ENV, "403")),
    "404": ({"message": "no such model"}, InputError, ("judge.model=judge-1", "judge.base_url", "no such model")),
    "402": ({}, FeedbackError, ("empty", "What was answered is kept")),
    "429": ({"more": {"code": "insufficient_quota"}}, FeedbackError, ("empty", "What was answered is kept")),
    "400": ({"more": {"param": "top_logprobs"}}, InputError, ("top_logprobs=20", "judge.extra_body", "answers=text")),
    # The name of another limit of tokens, or none of that parameter at all.
    "400 ": (
        {"message": "Unsupported parameter: max_completion_tokens"},
        InputError,
        ("max_completion_tokens=8", "judge.token_limit=max_tokens"),
    ),
    "422 ": ({"more": {"param": "temperature"}}, InputError, ("temperature=0.0", "leave it out (temperature: null)")),
    "422": ({"message": "logprobs is unknown to this model"}, InputError, ("logprobs=True", "judge.answers=text")),
}


@pytest.mark.parametrize("status", REFUSALS)
def test_what_does_not_pass_ends_the_asking(ask: Ask, status: str) -> None:
    values, kind, parts = REFUSALS[status]
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        asker = ask(proxy.url, max_retries=1, concurrency=1)
        assert only(asker).failure is None
        proxy.inject(status.strip(), times=2 if status == "429" else 1, **values)
        with pytest.raises(kind) as caught:
            list(asker.answer([question(str(k)) for k in range(50)]))
        assert proxy.requests == (3 if status == "429" else 2)
    for part in (*parts, proxy.url):
        assert part in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308"])
@pytest.mark.parametrize("place", ["another", "same"])
def test_a_redirect_takes_nothing_along(ask: Ask, status: str, place: str) -> None:
    with FakeEndpoint() as endpoint, FakeEndpoint() as other, FaultProxy(endpoint.url) as proxy:
        target = f"{other.url if place == 'another' else proxy.url}/chat/completions"
        proxy.inject(status, times=9, headers={"Location": f"{target}?token=t0psecret"})
        with pytest.raises(InputError, match=r"sends its callers elsewhere .* If you trust the other") as caught:
            only(ask(proxy.url, max_retries=2))
        assert proxy.requests == 1 and not other.headers and not other.bodies
    assert target in str(caught.value) and status in str(caught.value) and "t0psecret" not in str(caught.value)


def test_a_wrong_key_is_said_without_the_key(ask: Ask) -> None:
    with FakeEndpoint(key="another") as endpoint, pytest.raises(InputError) as caught:
        only(ask(endpoint.url))  # this endpoint says the key back
    assert "Incorrect API key provided: Bearer ***" in str(caught.value) and KEY not in str(caught.value)


@pytest.mark.parametrize("before", range(280, 301, 4))
def test_no_part_of_a_key_that_is_cut_shows(ask: Ask, before: int) -> None:
    message = "x" * before + KEY + "y" * 300
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        asker = ask(proxy.url, max_retries=0)
        proxy.inject("400", message=message)
        proxy.inject("body", text=json.dumps({"error": message}))
        for _ in range(2):
            failure = only(asker).failure
            assert failure is not None and KEY[:4] not in failure and 280 < len(failure) < 350


LONG = {
    "This model's maximum context length is 4096 tokens. However, your prompt contains 5000 input tokens": 400,
    "prompt is too long: 210000 tokens > 200000 maximum": 400,
    "the request exceeds the available context size, try increasing it": 400,
    "Please reduce the length of the messages": 422,
    "payload": 413,
}


@pytest.mark.parametrize("message", LONG)
def test_a_context_that_is_too_long_is_said_so(ask: Ask, message: str) -> None:
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        proxy.inject(str(LONG[message]), message=message)
        assert only(ask(proxy.url)) == Answer((), failure="too_long")
        assert proxy.requests == 1
        proxy.inject("400", message="content filter", more={"param": "messages"})
        assert only(ask(proxy.url)).failure == "endpoint_error: 400: content filter"


def test_too_many_characters_are_not_sent(ask: Ask) -> None:
    with FakeEndpoint() as endpoint:
        asker = ask(endpoint.url, max_prompt_chars=300)
        fitting, long = question("ü" * 300), question("ü" * 301)
        assert asker.fits(fitting) and not asker.fits(long)
        answers = dict(asker.answer([long, fitting]))
        told = dict(asker.explain([long], SAMPLED))
        assert len(endpoint.bodies) == 1
        assert ask(endpoint.url).fits(question("x" * 10**6))
    assert answers[0] == Answer((), failure="too_long") and answers[1].failure is None
    assert told[0].failure == "too_long" and told[0].texts == ()


# ---- Many at once ----------------------------------------------------------------------------------------------------


def test_concurrency_is_reached_and_never_passed(ask: Ask) -> None:
    def say(body: dict[str, Any]) -> Said:
        p = (1 + int(body["messages"][0]["content"])) / 200
        return one(_1=p, _2=1 - p)

    with FakeEndpoint(say, delay_s=0.05) as endpoint:
        asker = ask(endpoint.url, concurrency=7)

        def share(start: int) -> dict[int, Answer]:
            return dict(asker.answer([question(str(k)) for k in range(start, start + 20)]))

        with ThreadPoolExecutor(5) as pool:
            found = list(pool.map(share, range(0, 100, 20)))
        assert endpoint.most_in_flight == 7
    for start, answers in zip(range(0, 100, 20), found, strict=True):
        for k in range(20):
            assert answers[k].probabilities[0] == pytest.approx((1 + start + k) / 200)


def test_answers_come_as_they_come(ask: Ask) -> None:
    delays = {"0": 0.5, "1": 0.25, "2": 0.0}
    with FakeEndpoint(delay_s=lambda body: delays[body["messages"][0]["content"]]) as endpoint:
        asker = ask(endpoint.url)
        order, finished = [], []
        for index, _ in asker.answer([question(text) for text in delays]):
            order.append(index)
            finished.append(endpoint.finished)
    assert order == [2, 1, 0]
    assert finished == [1, 2, 3]  # each was given while the later ones were still on their way


def test_no_questions_no_requests(ask: Ask) -> None:
    with FakeEndpoint() as endpoint:
        assert list(ask(endpoint.url).answer([])) == [] and not endpoint.bodies


def tasks(asker: OpenAIAsker) -> int:
    """Tasks on the asker's loop, but for the one that counts."""

    async def count() -> int:
        return len(asyncio.all_tasks()) - 1

    return asyncio.run_coroutine_threadsafe(count(), asker._loop).result(5)


def test_a_caller_that_leaves_early_leaves_nothing(ask: Ask) -> None:
    delays = {"fast": 0.0, "slow": 30.0}
    with FakeEndpoint(delay_s=lambda body: delays[body["messages"][0]["content"]]) as endpoint:
        asker = ask(endpoint.url, concurrency=4, timeout_s=60)
        began = time.monotonic()
        for _ in asker.answer([question("slow")] * 3 + [question("fast")] + [question("slow")] * 100):
            break
        answers = asker.answer([question("slow")] * 10)
        answers.close()  # type: ignore[attr-defined]  # not even begun
        assert tasks(asker) == 0
        assert len(endpoint.bodies) <= 5
        assert len(list(asker.answer([question("fast")] * 4))) == 4  # all four places are free again
        for _ in range(100):
            if endpoint.in_flight == 0:
                break
            time.sleep(0.02)
        assert endpoint.in_flight == 0  # the connections were given up, too
        assert time.monotonic() - began < 10


def test_a_refusal_frees_every_place(ask: Ask) -> None:
    with FakeEndpoint(delay_s=0.02) as endpoint, FaultProxy(endpoint.url) as proxy:
        asker = ask(proxy.url, concurrency=4)
        for _ in range(3):
            time.sleep(0.2)  # what was given up has gone
            proxy.inject("404")
            with pytest.raises(InputError):
                list(asker.answer([question(str(k)) for k in range(40)]))
        assert tasks(asker) == 0
        assert len(list(asker.answer([question(str(k)) for k in range(16)]))) == 16
        assert endpoint.most_in_flight == 4


def test_closing_ends_what_is_being_asked(ask: Ask) -> None:
    with FakeEndpoint(delay_s=30) as endpoint:
        asker = ask(endpoint.url)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: list(asker.answer([question()])))
            while not endpoint.in_flight:
                time.sleep(0.01)
            asker.close()
            with pytest.raises(FeedbackError, match="closed"):
                waiting.result(5)
        asker.close()  # again
        for _ in range(100):
            if not endpoint.connections:
                break
            time.sleep(0.02)
        assert endpoint.connections == 0


def test_a_caller_that_leaves_a_closed_judge(ask: Ask) -> None:
    with FakeEndpoint(delay_s=lambda body: float(body["messages"][0]["content"])) as endpoint:
        asker = ask(endpoint.url)
        leaving, staying = (asker.answer([question("0"), question("30")]) for _ in range(2))
        assert next(leaving)[0] == next(staying)[0] == 0
        asker.close()
        leaving.close()  # type: ignore[attr-defined]
        with pytest.raises(FeedbackError, match="closed"):
            next(staying)


# ---- Money -----------------------------------------------------------------------------------------------------------


def test_cost_is_tokens_times_prices(ask: Ask) -> None:
    with FakeEndpoint(lambda _: Said([("1", {"1": 0.9, "2": 0.1})], usage=(1000, 3))) as endpoint:
        asker = ask(endpoint.url, price_in=2.0, price_out=8.0, max_cost=1.0)
        answer = only(asker)
        assert (answer.tokens_in, answer.tokens_out) == (1000, 3)
        assert answer.cost == pytest.approx((1000 * 2 + 3 * 8) / 1e6) == asker.spent
        list(asker.answer([question()] * 4))
        assert asker.spent == pytest.approx(5 * answer.cost)


def test_a_reply_that_does_not_count_its_tokens_costs_the_estimate(ask: Ask) -> None:
    with FakeEndpoint(lambda _: Said([("1", {"1": 0.9, "2": 0.1})], usage=None)) as endpoint:
        answer = only(ask(endpoint.url, price_in=3.0, price_out=5.0), question("x" * 300))
    assert (answer.tokens_in, answer.tokens_out) == (0, 0)
    assert answer.cost == pytest.approx(((300 / 3 + 8) * 3 + 8 * 5) / 1e6)  # 8 tokens may be written


# A request of 276 characters and 8 tokens costs at most (276 / 3 + 8) + 8 * 12.5 = 200 millionths; each reply, 100.
CAPPED = {"price_in": 1.0, "price_out": 12.5}
REPLY = Said([("1", {"1": 0.9, "2": 0.1})], usage=(75, 2))


def capped(count: int) -> list[Question]:
    return [question(f"{k:<276}") for k in range(count)]


@pytest.mark.parametrize("concurrency", [1, 3, 64])
def test_no_more_is_spent_than_allowed(ask: Ask, concurrency: int) -> None:
    with FakeEndpoint(lambda _: REPLY, delay_s=0.01) as endpoint:
        asker = ask(endpoint.url, max_cost=1000e-6, concurrency=concurrency, **CAPPED)
        answers = []
        with pytest.raises(FeedbackError) as caught:
            for _, answer in asker.answer(capped(50)):
                answers.append(answer)
        # After n replies 1000 - 100 n are left, and 200 must fit: 9 requests, however many at once.
        assert len(answers) == len(endpoint.bodies) == 9
        assert asker.spent == pytest.approx(900e-6)
        assert endpoint.most_in_flight == min(concurrency, 5)  # 5 times 200 in flight at most
        with pytest.raises(FeedbackError):
            only(asker, capped(1)[0])
        assert len(endpoint.bodies) == 9
    for part in ("judge.max_cost=0.001", "0.0009", "What was answered is kept", "raise judge.max_cost"):
        assert part in str(caught.value)


def test_what_earlier_runs_spent_counts(ask: Ask) -> None:
    with FakeEndpoint(lambda _: REPLY) as endpoint:
        asker = ask(endpoint.url, spent=700e-6, max_cost=1000e-6, **CAPPED)
        found = []
        with pytest.raises(FeedbackError):
            found += [found.append(answer) for answer in asker.answer(capped(9))]
        assert len(endpoint.bodies) == 2 and asker.spent == pytest.approx(900e-6)


def test_callers_share_the_cap(ask: Ask) -> None:
    with FakeEndpoint(lambda _: REPLY, delay_s=0.005) as endpoint:
        asker = ask(endpoint.url, max_cost=1000e-6, **CAPPED)

        def share(_: int) -> int:
            count = 0
            with pytest.raises(FeedbackError):
                for _ in asker.answer(capped(20)):
                    count += 1
            return count

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(share, range(4))) == 9 == len(endpoint.bodies)


def test_replies_that_could_not_be_read_count_against_the_cap(ask: Ask) -> None:
    with FakeEndpoint(lambda _: REPLY) as endpoint, FaultProxy(endpoint.url) as proxy:
        asker = ask(proxy.url, max_cost=1000e-6, max_retries=9, **CAPPED)
        proxy.inject("body", times=9)
        answer = only(asker, capped(1)[0])
        # After four at 200 there is room for a fifth; it spends the last.
        assert answer.failure == "bad_reply: no JSON" and proxy.requests == 5
        assert asker.spent == pytest.approx(1000e-6)


# ---- Explanations ----------------------------------------------------------------------------------------------------


def writes(body: dict[str, Any]) -> Said:
    count = body.get("n", 1)
    return Said(texts=[f" reason {body.get('seed', 'greedy')}/{k}\n" for k in range(count)], usage=(10, 5 * count))


def free(text: str = "Why?") -> Question:
    return Question((Message("user", text),))


def test_explanations(ask: Ask) -> None:
    with FakeEndpoint(writes) as endpoint:
        asker = ask(endpoint.url, price_in=1.0, price_out=2.0)
        ((_, told),) = asker.explain([free()], SAMPLED)
        body = endpoint.bodies[0]
        ((_, again),) = asker.explain([free()], SAMPLED)
        ((_, other),) = asker.explain([free("How?")], SAMPLED)
    assert len(told.texts) == 3 and len(set(told.texts)) == 3 and told.failure is None
    assert all(text == text.strip() for text in told.texts)
    assert (told.tokens_in, told.tokens_out) == (10, 15) and told.cost == pytest.approx(40e-6)
    assert (body["n"], body["max_completion_tokens"], body["temperature"]) == (3, 20, 0.7)
    assert "logprobs" not in body and 0 <= body["seed"] < 2**31
    assert again.texts == told.texts and not set(other.texts) & set(told.texts)  # seeds follow from the question


def test_greedy_explanations_are_asked_for_once(ask: Ask) -> None:
    with FakeEndpoint(writes) as endpoint:
        ((_, told),) = ask(endpoint.url).explain([free()], GenerationSettings(2, 20, 0.0, 5))
        (body,) = endpoint.bodies
    assert told.texts == ("reason greedy/0",) * 2
    assert body["temperature"] == 0.0 and "n" not in body and "seed" not in body


@pytest.mark.parametrize("how", ["refuses n", "refuses n in words", "ignores n"])
def test_endpoints_that_write_one_at_a_time(ask: Ask, how: str) -> None:
    def say(body: dict[str, Any]) -> Said:
        return writes({**body, "n": 1})

    with FakeEndpoint(say) as endpoint, FaultProxy(endpoint.url) as proxy:
        if how == "refuses n":
            proxy.inject("400", more={"param": "n"})
        elif how == "refuses n in words":
            proxy.inject("422", message="'n' must be 1")
        asker = ask(proxy.url, price_in=1.0)
        ((_, told),) = asker.explain([free()], SAMPLED)
        assert len(set(told.texts)) == 3  # each with a seed of its own
        assert (told.tokens_in, told.tokens_out) == (30, 15) and told.cost == pytest.approx(30e-6)
        assert proxy.requests == (3 if how == "ignores n" else 4)
        list(asker.explain([free()], SAMPLED))
        assert all("n" not in body for body in endpoint.bodies[-3:])  # it has learned


def test_an_explanation_without_words_is_a_failure(ask: Ask) -> None:
    with FakeEndpoint(lambda _: Said(texts=["good", " ", "fine"], usage=(10, 7))) as endpoint:
        ((_, told),) = ask(endpoint.url, price_out=1.0).explain([free()], SAMPLED)
    assert (told.texts, told.failure, told.tokens_out) == ((), "no_rationale", 7)
    assert told.cost == pytest.approx(7e-6)


def test_an_explanation_that_meets_a_fault(ask: Ask) -> None:
    with FakeEndpoint(lambda body: writes({**body, "n": 1})) as endpoint, FaultProxy(endpoint.url) as proxy:
        asker = ask(proxy.url, max_retries=0, price_out=1.0)
        assert dict(asker.explain([free()], SAMPLED))[0].failure is None  # it writes one at a time
        proxy.inject("500")
        told = dict(asker.explain([free()], SAMPLED))[0]
        assert (told.texts, told.failure) == ((), "endpoint_error: 500")


# ---- Key, address, identity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "", "  "])
def test_the_key_must_be_set(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(ENV) if value is None else monkeypatch.setenv(ENV, value)
    with pytest.raises(InputError) as caught:
        OpenAIAsker(OpenAIJudge(type="openai", model="m", api_key_env=ENV))
    for part in (ENV, "not set", "https://api.openai.com/v1", "judge.api_key_env", "export"):
        assert part in str(caught.value)


def test_a_local_server_needs_no_key(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENV)
    with FakeEndpoint() as endpoint:
        assert only(ask(endpoint.url)).failure is None
        assert endpoint.headers[0]["Authorization"] == "Bearer none"
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        asker = ask("", base_url=None)
        assert only(asker).failure is None and endpoint.url in asker.identity
    with FakeEndpoint(key=KEY) as endpoint, pytest.raises(InputError, match=f"{ENV}, which is not set"):
        only(ask(endpoint.url))


def test_a_key_that_no_header_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("sk-ü", "sk-1\nsk-2", "sk-\x00"[:4] + "\t"):
        if "\t" in key:
            key = "sk\tx"
        monkeypatch.setenv(ENV, key)
        with pytest.raises(InputError, match="printable ASCII") as caught:
            OpenAIAsker(judge("http://localhost:1/v1"))
        assert key not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "/v1", "http://host:port/v1"])
def test_an_address_must_be_one(url: str) -> None:
    with pytest.raises(InputError, match=r"judge\.base_url") as caught:
        OpenAIAsker(judge(url))
    assert "http://localhost:8000/v1" in str(caught.value)


def test_an_address_must_not_hold_a_password() -> None:
    with pytest.raises(InputError, match=r"judge\.api_key_env") as caught:
        OpenAIAsker(judge("http://user:secret@localhost:1/v1"))
    assert "secret" not in str(caught.value)


def test_identity_is_what_answers_depend_on(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "http://localhost:1/v1"
    same = [ask(url), ask(url + "/"), ask(url, concurrency=3, max_retries=1, timeout_s=1, price_in=1.0, max_cost=2.0)]
    monkeypatch.setenv(ENV, "another")
    same.append(ask(url))
    assert len({asker.identity for asker in same}) == 1
    others = [ask("http://localhost:2/v1"), ask(url, model="judge-2"), ask(url, answers="text")]
    others.append(ask(url, extra_body={"top_k": 5}))
    assert len({asker.identity for asker in [same[0], *others]}) == 5
    assert same[0].name == "judge-1" and others[1].name == "judge-2"
    assert not any(word in asker.identity for asker in same for word in (KEY, "another"))


def test_the_key_is_nowhere(ask: Ask, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever goes wrong, and at the most talkative level."""
    shown = []
    with (
        caplog.at_level(logging.DEBUG),
        FakeEndpoint(lambda body: Said(texts=["1"], logprobs=False)) as endpoint,
        FaultProxy(endpoint.url) as proxy,
    ):
        asker = ask(proxy.url, max_retries=1, timeout_s=scaled(0.3))
        faults: list[tuple[str, dict[str, Any]]] = [(kind, values) for kind, values, _ in FAULTS.values()]
        faults += [(status, {**values, "message": f"not {KEY}"}) for status, (values, _, _) in REFUSALS.items()]
        faults += [("400", {"message": f"not {KEY}"}), ("body", {"text": json.dumps({"error": KEY})}), ("none", {})]
        for kind, values in faults:
            proxy.faults.clear()
            if kind != "none":
                proxy.inject(kind, times=2, **values)
            try:
                shown.append(repr(only(asker)))
            except (InputError, FeedbackError) as error:
                shown += [str(error), repr(error), repr(pickle.loads(pickle.dumps(error)))]
                shown.append("".join(traceback.TracebackException.from_exception(error, capture_locals=False).format()))
                while error is not None:  # nothing that holds the request hangs on to it
                    assert type(error).__module__.split(".")[0] not in ("openai", "aiohttp", "httpx2")
                    error = error.__context__  # type: ignore[assignment]
        shown += [repr(asker), str(asker), repr(vars(asker)), asker.identity, asker.name, repr(asker._cfg)]
        shown += [repr(vars(asker._endpoint)["_client"]), *(repr(thread) for thread in threading.enumerate())]
    out = capfd.readouterr()
    assert len(shown) > 30 and caplog.text  # it did talk
    assert "***" in "".join(shown)
    assert not any(KEY in text for text in [*shown, caplog.text, out.out, out.err])


def test_control_texts_of_common_models_are_defused() -> None:
    for text in SPECIAL:
        assert text not in neutralise(f"before {text} after", (), SPECIAL)


def test_replies_are_read_whatever_the_endpoint_leaves_out() -> None:
    reply = read_reply(b'{"choices": [{"message": {"content": null}}, {"message": {}}]}')
    assert reply.texts == ("", "") and reply.positions is None and not reply.counted and not reply.cut
