"""Whatever an endpoint sends, it costs the question that was asked, and never the job."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from rlaif_ray.errors import InputError
from rlaif_ray.feedback.remembered import Memory
from rlaif_ray.feedback.remote import OpenAIAsker
from rlaif_ray.feedback.replies import MOST_TOKENS, BadReplyError, read_probabilities, read_reply
from rlaif_ray.feedback.verdicts import LONGEST_ANSWER, LONGEST_TEXT, parse_verdict
from rlaif_ray.types import Answer, Explanation
from tests.damage import odd_json
from tests.endpoint import FakeEndpoint, FaultProxy, completion, one
from tests.pace import scaled
from tests.unit.feedback.test_remote import ENV, KEY, judge, question

GOOD = completion(one(_1=0.75, _2=0.25), {"model": "m", "logprobs": True, "top_logprobs": 20})


def changed(**changes: str) -> str:
    """A good completion with other values, as JSON; some its writer would refuse."""
    text = json.dumps({**GOOD, **{key: f"<{key}>" for key in changes}})
    for key, value in changes.items():
        text = text.replace(f'"<{key}>"', value)
    return text


def usage(prompt: str, completed: str = "1") -> str:
    return changed(usage=f'{{"prompt_tokens": {prompt}, "completion_tokens": {completed}}}')


def choice(logprob: str) -> str:
    position = f'{{"token": "1", "logprob": -1, "top_logprobs": [{{"token": "1", "logprob": {logprob}}}]}}'
    return changed(choices=f'[{{"message": {{"content": "1"}}, "logprobs": {{"content": [{position}]}}}}]')


DEEP = "[" * 20_000 + "]" * 20_000
UNREADABLE = {
    "deep": DEEP,
    "deep objects": '{"choices":' * 20_000,
    "deep where nobody looks": changed(usage=DEEP),
    "digits": usage("1" + "0" * 400),
    "very many digits": usage("1" * 100_000),
    "a list": "[1]",
    "choices of numbers": changed(choices="[1, 2]"),
    "choices of nothing": changed(choices='[{"message": null}]'),
    "an error that is deep": changed(choices="[]", error="[" * 90 + "]" * 90),
    "an error of many digits": changed(choices="[]", error="1" * 290),
    "half a character": '{"choices": "\ud83d"}',
    "log-probability of digits": choice("1" * 299),
    "NaN": choice("NaN"),
}
COUNTED = {  # read, and the cost is the upper estimate
    "large": usage(str(10**100)),
    "above what a request has": usage(str(MOST_TOKENS + 1)),
    "negative": usage("-5"),
    "text": usage('"12"'),
    "a fraction": usage("1.5"),
    "true": usage("true"),
    "infinite": usage("1e999"),
    "a list": changed(usage="[1]"),
    "null": changed(usage="null"),
}


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An asker that counts cost, and what can put faults in front of its endpoint."""
    monkeypatch.setenv(ENV, KEY)
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        asker = OpenAIAsker(judge(proxy.url, price_in=1e3, price_out=1e3, max_retries=0))
        yield asker, proxy
        asker.close()


def answers(asker: OpenAIAsker) -> list[Answer]:
    """Of the question that meets the fault, and of one more."""
    first = dict(asker.answer([question()]))[0]
    return [first, dict(asker.answer([question("Another?")]))[0]]


def test_replies_that_can_not_be_read(proxied: Any) -> None:
    asker, proxy = proxied
    for name, text in UNREADABLE.items():
        proxy.inject("body", text=text)
        bad, good = answers(asker)
        assert bad.failure is not None and bad.failure.startswith("bad_reply: "), name
        assert good.probabilities == pytest.approx((0.75, 0.25)), name
    assert math.isfinite(asker.spent)


def test_usage_that_is_none_costs_the_estimate(proxied: Any) -> None:
    asker, proxy = proxied
    for name, text in COUNTED.items():
        proxy.inject("body", text=text)
        odd, good = answers(asker)
        assert odd.failure is None and odd.tokens_in == odd.tokens_out == 0, name
        assert math.isfinite(odd.cost) and odd.cost > 0 and good.tokens_in == 10, name


@pytest.mark.parametrize("status", [200, 400, 500])
def test_replies_without_end(proxied: Any, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif_ray.feedback.endpoint.REPLY_BYTES", 1 << 20)
    asker, proxy = proxied
    for kind in ("bomb", "body"):
        proxy.inject(kind, status=status, text=" " * (4 << 20))
        bad, good = answers(asker)
        assert bad.failure == "bad_reply: longer than 1,048,576 bytes" and good.failure is None


def test_errors_of_any_form(proxied: Any) -> None:
    asker, proxy = proxied
    texts = [DEEP, "[" * 900 + "]" * 900, '{"error":' * 800 + "1" + "}" * 800, '{"error": {"message": 5, "code": {}}}']
    texts += ['{"error": {"message": null, "param": [1], "code": "' + "x" * 100_000 + '"}}', "1" * 5000, "null", ""]
    for status in (400, 422, 500, 418):  # a redirect ends the job
        for text in texts:
            proxy.inject("body", text=text, status=status, headers={"Retry-After": "1e400"})
            bad, good = answers(asker)
            assert bad.failure is not None and good.failure is None, (status, text[:20])


def test_headers_of_any_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        asker = OpenAIAsker(judge(proxy.url, max_retries=1))
        for value in ("nan", "-1", "1e400", "Wed, 21 Oct 99999999999 07:28:00 GMT", "Wed, 99 Oct 2015 99:99:99 +9999"):
            proxy.inject("body", text="{}", status=503, headers={"Retry-After": value, "Retry-After-Ms": value})
            failures = [answer.failure for answer in answers(asker)]
            assert failures[1] is None, value
        asker.close()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=odd_json(GOOD))
def test_odd_replies(data: bytes) -> None:
    try:
        reply = read_reply(data)
        reading = read_probabilities(reply.positions or (), ("1", "2"))
    except BadReplyError:
        return
    assert all(isinstance(text, str) for text in reply.texts)
    assert 0 <= reply.tokens_in <= MOST_TOKENS and 0 <= reply.tokens_out <= MOST_TOKENS
    assert all(math.isfinite(p) and 0 <= p <= 1.01 for p in reading.probabilities)


@pytest.mark.parametrize("unit", ["[[A]] ", "1 ", "</think>", "Response 1 is ", "x", "\n"])
def test_a_text_without_end_takes_no_time(unit: str) -> None:
    began = time.perf_counter()
    for length in (LONGEST_ANSWER, 20 * LONGEST_TEXT):
        parse_verdict(unit * (length // len(unit)), ("1", "2"), asks_for="better")
    assert time.perf_counter() - began < scaled(15.0)
    thought = f"<think>{'x' * LONGEST_ANSWER * 2}</think>The answer is 2."
    assert (found := parse_verdict(thought, ("1", "2"))) is not None and found.answer == "2"


# ---- What is remembered ----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=odd_json({"probabilities": [0.5, 0.5], "outside": 0.0, "hard": False, "cost": 0.1, "failure": None}))
def test_what_is_no_answer_is_asked_again(tmp_path: Path, data: bytes) -> None:
    memory = Memory(tmp_path / "answers.sqlite")
    memory.put(b"k", Answer((0.25, 0.75)))
    memory._database.execute("UPDATE replies SET reply = ?", (data.decode("utf-8", "replace"),))
    for kind in (Answer, Explanation):
        found = memory.get(b"k", kind)
        assert found is None or isinstance(found, kind)
    memory.close()


def test_texts_with_half_a_character_are_remembered(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "answers.sqlite")
    memory.put(b"k", Explanation(("\ud800 x",)))
    assert memory.get(b"k", Explanation) == Explanation(("\ud800 x",)) and memory.get(b"k", Answer) is None
    memory.close()


def test_a_damaged_memory(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    memory = Memory(path)
    for k in range(500):
        memory.put(k.to_bytes(2, "little"), Answer((0.25, 0.75)))
    memory.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"answers.sqlite can't be .*Remove"):
        Memory(path).get(b"\5\0", Answer)
