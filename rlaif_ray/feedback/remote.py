"""A judge behind an OpenAI-compatible endpoint: questions go out as chat completions, and the log-probabilities of what
it says, or its words alone, come back as answers.

All requests run on one asyncio loop in one thread, whichever threads ask. The official client sends them and retries
what met 408, 409, 429, 5xx, a timeout or a broken connection; replies that can't be read are retried here. Raw
replies are read instead of the client's typed ones, which cost as much time as all the rest of a request.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from rlaif_ray.errors import FeedbackError, InputError
from rlaif_ray.feedback.replies import BadReplyError, Reply, parse_answer, read_probabilities, read_reply
from rlaif_ray.types import Answer, Explanation, Question

if TYPE_CHECKING:
    from openai import APIError, APIStatusError

    from rlaif_ray.config.sections import OpenAIJudge
    from rlaif_ray.interfaces import GenerationSettings

# An endpoint does not say what its tokenizer takes for control: these are the chat formats that are common.
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|endoftext|>", "<|endofprompt|>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|eot|>", "<|header_start|>", "<|header_end|>"),
    *("<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
    *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<start_of_turn>", "<end_of_turn>"),
    *("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "<<SYS>>", "<</SYS>>"),
    *("<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    *("<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<think>", "</think>"),
)

ANSWER_TOKENS = 4  # written for log-probabilities: white space or a quote may come before the answer
TEXT_TOKENS = 16  # written where the text is the answer
EVENTS_A_TURN = 4
LONGEST_WAIT_S = 120.0  # that the client waits because a Retry-After asks for it
DUMMY_KEY = "none"

Result = TypeVar("Result", Answer, Explanation)

_TOO_LONG = re.compile(
    r"context.{0,12}(length|window|size)|max_model_len|too many (input )?tokens|(prompt|input|message).{0,20} too long|"
    r"string_above_max_length|reduce the length|exceeds?.{0,40}(input|prompt|context).{0,20}tokens",
    re.IGNORECASE | re.DOTALL,
)


class OpenAIAsker:
    """An Asker over HTTP. `answer_prefix` of a question is not sent: nothing can be put into an endpoint's mouth."""

    special = SPECIAL

    def __init__(self, cfg: OpenAIJudge, *, spent: float = 0.0) -> None:
        """Sends nothing yet.

        Args:
            spent: by earlier runs; counts against `cfg.max_cost`.

        Raises:
            InputError: the key's environment variable is not set, or the address is none.
        """
        import openai

        base_url = cfg.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        self._url = shown_url(base_url)
        self._key = read_key(cfg, self._url, needed="api.openai.com" in self._url)
        self.name = cfg.model
        extra = hashlib.sha256(json.dumps(cfg.extra_body, sort_keys=True).encode()).hexdigest()[:16]
        self.identity = f"openai/{self._url}/{cfg.model}/{cfg.answers}/{extra}"
        self._cfg = cfg
        self._budget = _Budget(cfg.max_cost, spent)
        self._slots = asyncio.Semaphore(cfg.concurrency)
        self._several = True  # whether the endpoint takes `n`; found out when it is asked
        self._understood = False  # whether any text of it could be parsed
        self._calls: set[asyncio.Task[None]] = set()
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=base_url,
            timeout=cfg.timeout_s,
            max_retries=cfg.max_retries,
            # Over aiohttp a request costs a quarter of what it does over httpx with 256 in flight.
            http_client=openai.DefaultAioHttpClient(timeout=cfg.timeout_s, limits=_limits(cfg.concurrency)),
        )
        self._loop = asyncio.SelectorEventLoop(_FewAtOnce())
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-judge", daemon=True)
        self._thread.start()

    @property
    def spent(self) -> float:
        """Cost so far, that of earlier runs included. Replies that did not say count with an upper estimate."""
        return self._budget.spent

    def fits(self, question: Question) -> bool:
        limit = self._cfg.max_prompt_chars
        return limit is None or sum(len(turn.content) for turn in question.turns) <= limit

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Each as it comes.

        Raises:
            InputError: the endpoint does not know key or model, or has no log-probabilities.
            FeedbackError: `max_cost` is reached, or the account is empty; what was in flight has been yielded.
        """
        assert all(question.answers for question in questions), "free text is asked for with `explain`"
        return self._each(questions, self._answer, self._answer_body, 1, lambda: Answer((), failure="too_long"))

    def explain(self, questions: Sequence[Question], settings: GenerationSettings) -> Iterator[tuple[int, Explanation]]:
        """Each as it comes; raises as `answer` does."""
        # Greedy texts are all the same, and some endpoints refuse to write several.
        wanted = 1 if settings.temperature == 0 else settings.samples_per_prompt

        def body(question: Question) -> dict[str, Any]:
            return self._explain_body(question, settings, 0, wanted)

        ask = partial(self._explain, settings=settings, wanted=wanted)
        return self._each(questions, ask, body, wanted, lambda: Explanation((), failure="too_long"))

    def close(self) -> None:
        """Ends what is still being asked, then connections and thread. May be called twice."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut(self) -> None:
        for call in self._calls:
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        await self._client.close()
        await self._loop.shutdown_default_executor()

    # Calls: a caller's thread waits on a queue that the loop's thread fills

    def _each(
        self,
        questions: Sequence[Question],
        ask: Callable[[Question, dict[str, Any], float], Coroutine[Any, Any, Result]],
        make_body: Callable[[Question], dict[str, Any]],
        requests: int,
        too_long: Callable[[], Result],
    ) -> Iterator[tuple[int, Result]]:
        results: SimpleQueue[tuple[int, Result] | asyncio.Task[None]] = SimpleQueue()
        calls: list[asyncio.Task[None]] = []

        async def run() -> None:
            stop: FeedbackError | None = None
            async with asyncio.TaskGroup() as group:
                for i, question in enumerate(questions):
                    if not self.fits(question):
                        results.put((i, too_long()))
                        continue
                    body = make_body(question)
                    most = self._most(body, requests)
                    stop = await self._take_slot(most)
                    if stop is not None:
                        break
                    task = group.create_task(deliver(i, question, body, most / requests))
                    task.add_done_callback(partial(self._return_slot, most))
            if stop is not None:
                raise stop

        async def deliver(i: int, question: Question, body: dict[str, Any], most: float) -> None:
            results.put((i, await ask(question, body, most)))

        def start() -> None:
            call = self._loop.create_task(run())
            calls.append(call)
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
            call.add_done_callback(results.put)  # the last in the queue: the call itself

        self._loop.call_soon_threadsafe(start)
        last: asyncio.Task[None] | None = None
        try:
            while not isinstance(item := results.get(), asyncio.Task):
                yield item
            last = item
        finally:
            if last is None:  # the caller wants no more
                self._loop.call_soon_threadsafe(lambda: calls[0].cancel())
                while not isinstance(results.get(), asyncio.Task):
                    pass
        _raise_cause(last)

    async def _take_slot(self, most: float) -> FeedbackError | None:
        """Waits until one more request may be sent that costs `most` at most; an error when it never may."""
        await self._slots.acquire()
        try:
            fits = await self._budget.reserve(most)
        except BaseException:
            self._slots.release()
            raise
        if fits:
            return None
        self._slots.release()
        return FeedbackError(
            f"judge.max_cost={self._cfg.max_cost:g} is as good as spent ({self._budget.spent:.6g}, and the next "
            f"request could cost {most:.2g}): asking stopped. What was answered is kept; raise judge.max_cost and start "
            f"the same command again."
        )

    def _return_slot(self, most: float, _: object) -> None:
        self._budget.release(most)
        self._slots.release()

    # Questions

    def _body(self, question: Question, **parameters: Any) -> dict[str, Any]:
        messages = [{"role": turn.role, "content": turn.content} for turn in question.turns]
        return {"model": self._cfg.model, "messages": messages, **parameters, **self._cfg.extra_body}

    def _answer_body(self, question: Question) -> dict[str, Any]:
        if self._cfg.answers == "text":
            return self._body(question, max_completion_tokens=TEXT_TOKENS, temperature=0.0)
        # Some servers give log-probabilities after temperature and truncation: at 1 and 1 they are the model's own.
        return self._body(
            question, max_completion_tokens=ANSWER_TOKENS, temperature=1.0, top_p=1.0, logprobs=True, top_logprobs=20
        )

    def _explain_body(self, question: Question, settings: GenerationSettings, have: int, wanted: int) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "max_completion_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
        }
        if settings.temperature > 0:
            parameters["seed"] = _seed(settings.seed, question, have)
        if self._several and wanted - have > 1:
            parameters["n"] = wanted - have
        return self._body(question, **parameters)

    async def _answer(self, question: Question, body: dict[str, Any], most: float) -> Answer:
        try:
            reply = await self._reply(body, most)
        except _FailedError as failed:
            return Answer((), failure=str(failed))
        told = {"tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out, "cost": self._cost(reply, most)}
        if self._cfg.answers == "text":
            return self._answer_in_words(question, reply, told)
        if reply.positions is None and reply.texts[0].strip():
            raise InputError(
                f"judge.answers=logprobs needs log-probabilities (the endpoint {self._url} gave a text without any "
                f"for judge.model={self._cfg.model}): the probability of an answer can't be read. Use "
                f"judge.answers=text, whose labels are hard, or an endpoint that has them."
            )
        try:
            probabilities = read_probabilities(reply.positions or (), question.answers)
        except BadReplyError as bad:
            return Answer((), failure=f"bad_reply: {bad}", **told)
        total = sum(probabilities)
        if total <= 0.0:
            return Answer((), failure="no_probability", **told)
        return Answer(tuple(p / total for p in probabilities), outside=max(0.0, 1.0 - total), **told)

    def _answer_in_words(self, question: Question, reply: Reply, told: dict[str, Any]) -> Answer:
        said = parse_answer(reply.texts[0], question.answers, question.answer_prefix)
        if said is not None:
            self._understood = True
            return Answer(tuple(float(a == said) for a in question.answers), hard=True, **told)
        if not self._understood and reply.cut and not reply.texts[0].strip():
            raise InputError(
                f"judge.model={self._cfg.model} wrote {reply.tokens_out} tokens and said nothing: it thinks before it "
                f"answers, and ran out of tokens. Give it room, such as judge.extra_body.max_completion_tokens=2048, "
                f"or turn its thinking off through judge.extra_body."
            )
        return Answer((), failure="unparsed", **told)

    async def _explain(
        self, question: Question, body: dict[str, Any], most: float, *, settings: GenerationSettings, wanted: int
    ) -> Explanation:
        texts: list[str] = []
        tokens_in = tokens_out = 0
        cost = 0.0
        failure = None
        while len(texts) < wanted and failure is None:
            several = body.get("n", 1)
            try:
                reply = await self._reply(body, most * several)
            except _OneAtATimeError:
                self._several = False
            except _FailedError as failed:
                failure = str(failed)
            else:
                self._several = self._several and len(reply.texts) >= several
                texts += reply.texts[: wanted - len(texts)]
                tokens_in, tokens_out = tokens_in + reply.tokens_in, tokens_out + reply.tokens_out
                cost += self._cost(reply, most * several)
            body = self._explain_body(question, settings, len(texts), wanted)
        if failure is None and not all(text.strip() for text in texts):
            failure = "no_rationale"
        said = () if failure else tuple(text.strip() for text in texts) * (settings.samples_per_prompt // wanted)
        return Explanation(said, tokens_in, tokens_out, cost, failure)

    # Money

    def _most(self, body: dict[str, Any], requests: int) -> float:
        """More than so many requests with this body will cost, as far as one can know without a tokenizer."""
        texts = [turn["content"] for turn in body["messages"]]
        tokens_in = sum(len(text.encode("utf-8", "replace")) / 3 + 8 for text in texts)
        tokens_out = body.get("max_completion_tokens") or 0
        tokens_out = max(tokens_out, body.get("max_tokens") or 0)
        return requests * (tokens_in * self._cfg.price_in + tokens_out * self._cfg.price_out) / 1e6

    def _cost(self, reply: Reply, most: float) -> float:
        if not reply.counted:
            return most
        return (reply.tokens_in * self._cfg.price_in + reply.tokens_out * self._cfg.price_out) / 1e6

    # Requests

    async def _reply(self, body: dict[str, Any], most: float) -> Reply:
        """What the endpoint says; asked again, within the same number of retries, when that can't be read.

        Raises:
            _FailedError: it did not say anything readable; the reason is the failure's.
        """
        content = json.dumps(body).encode()
        left = self._cfg.max_retries
        while True:
            try:
                response = await self._post(content, body, left)
                # The client counts its retries in a header of its own.
                left -= int(response.request.headers.get("x-stainless-retry-count", 0))
                reply = read_reply(response.content)
            except BadReplyError as bad:
                self._budget.spent += most  # it may have been charged for: the endpoint did not say
                if left <= 0 or not self._budget.fits():
                    raise _FailedError(f"bad_reply: {self._masked(str(bad))}") from None
                left -= 1
                await asyncio.sleep(min(0.5 * 2 ** (self._cfg.max_retries - left - 1), 8.0) * random.uniform(0.75, 1.0))
            else:
                self._budget.spent += self._cost(reply, most)
                return reply

    async def _post(self, content: bytes, body: dict[str, Any], retries: int) -> Any:
        """The endpoint's response, status 200.

        Errors of ours are raised outside the handlers: what the client raises holds the request, and so the key.
        """
        import aiohttp
        import httpx2
        import openai

        problem: Exception
        try:
            # The client's timeout is for each read: this ends an endpoint that sends a byte now and then.
            async with asyncio.timeout((1 + retries) * (self._cfg.timeout_s + LONGEST_WAIT_S)):
                return await self._client.post(
                    "/chat/completions", content=content, cast_to=httpx2.Response, options={"max_retries": retries}
                )
        except openai.APIStatusError as error:
            problem = self._refusal(error, body)
        except openai.APIConnectionError as error:
            problem = _FailedError(f"endpoint_error: {_innermost(error)}")
        except TimeoutError:
            problem = _FailedError("endpoint_error: timeout")
        except aiohttp.ClientError as error:  # what is no HTTP gets through the client as it is
            problem = BadReplyError(type(error).__name__)
        raise problem

    def _refusal(self, error: APIStatusError, body: dict[str, Any]) -> Exception:
        """What an error status means."""
        status, said = error.status_code, self._said(error)
        got = f"(got {status}: {said})"
        if status in (401, 403):
            without = "" if self._key != DUMMY_KEY else ", which is not set"
            return InputError(
                f"the endpoint {self._url} refused the key of {self._cfg.api_key_env}{without} {got}. Put a valid key "
                f"into that environment variable, and check that it may use judge.model={self._cfg.model}."
            )
        if status == 404:
            return InputError(
                f"the endpoint {self._url} does not know judge.model={self._cfg.model} {got}. Name a model that it "
                f"lists under /models, or check judge.base_url: it usually ends in /v1."
            )
        if status == 402 or error.code == "insufficient_quota":
            return FeedbackError(
                f"the account at {self._url} is empty {got}: asking stopped. What was answered is kept; fill it up and "
                f"start the same command again."
            )
        if status == 413 or (status in (400, 422) and _TOO_LONG.search(f"{error.code} {said}")):
            return _FailedError("too_long")
        if status in (400, 422):
            about = error.param if error.param in body else None
            if "n" in body and (about == "n" or re.search(r"\bn\b", said)):
                return _OneAtATimeError()
            if about is not None and about not in ("messages", "model"):
                return InputError(
                    f"the endpoint {self._url} does not take {about}={body[about]!r} {got}. Set it to what "
                    f"judge.model={self._cfg.model} takes through judge.extra_body; where it has no log-probabilities, "
                    f"use judge.answers=text."
                )
            return _FailedError(f"endpoint_error: {status}: {said}")
        return _FailedError(f"endpoint_error: {status}")

    def _said(self, error: APIError) -> str:
        body = error.body
        text = str(body.get("message") or body) if isinstance(body, dict) else str(body or error.message)
        return self._masked(" ".join(text.split())[:300])

    def _masked(self, text: str) -> str:
        """`text` without the key: some endpoints say it back."""
        return text if self._key == DUMMY_KEY else text.replace(self._key, "***")


class _FailedError(Exception):
    """A question gets no answer; the message is its failure."""


class _OneAtATimeError(Exception):
    """The endpoint does not write several texts in one request."""


class _Budget:
    """What was spent, and what the requests in flight cost at most. For the loop's thread alone."""

    def __init__(self, cap: float | None, spent: float) -> None:
        self.spent = spent
        self._cap = cap
        self._reserved = 0.0
        self._in_flight = 0
        self._changed = asyncio.Event()

    def fits(self, more: float = 0.0) -> bool:
        return self._cap is None or self.spent + self._reserved + more <= self._cap

    async def reserve(self, most: float) -> bool:
        """Waits for requests in flight, which mostly cost less than was reserved; False when that does not help."""
        while not self.fits(most):
            if not self._in_flight:
                return False
            self._changed.clear()
            await self._changed.wait()
        self._in_flight += 1
        self._reserved += most
        return True

    def release(self, most: float) -> None:
        self._in_flight -= 1
        self._reserved = self._reserved - most if self._in_flight else 0.0  # 0 again whatever the rounding
        self._changed.set()


class _FewAtOnce(selectors.DefaultSelector):
    """Hands asyncio a few ready connections at a time.

    A loop carries everything that is ready through each step together. Replies that came one after the other would be
    done, and their successors sent, all at the same moment: with hundreds in flight most of the time then goes by
    either without a request to work on or with all of them waiting for the last.
    """

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout)[:EVENTS_A_TURN]


def shown_url(url: str) -> str:
    """The address without what may be secret in it. Raises InputError when it is none."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = parts = None
    if parts is None or parts.scheme not in ("http", "https") or not host:
        raise InputError(
            "judge.base_url (or OPENAI_BASE_URL) must be an address such as http://localhost:8000/v1 "
            f"(got {url.rpartition('@')[2]!r}): nothing can be reached there. Write it with http:// or https://."
        )
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"


def read_key(cfg: OpenAIJudge, url: str, *, needed: bool) -> str:
    """The key, from its environment variable; a dummy when there is none and the endpoint may do without."""
    name = cfg.api_key_env
    key = os.environ.get(name, "").strip()
    if not key and needed:
        raise InputError(
            f"the environment variable {name} must hold the key of {url} (it is not set): the judge is asked with it. "
            f"Run export {name}=..., or name the variable that has it in judge.api_key_env."
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"the key in {name} has characters that no HTTP header takes (something beyond printable ASCII). Copy it "
            f"into the variable again."
        )
    return key or DUMMY_KEY


def _limits(concurrency: int) -> Any:
    import httpx2

    return httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)


def _seed(seed: int, question: Question, sample: int) -> int:
    """Of the samples from this one on; the same wherever and beside whatever the question is asked."""
    texts = "\0".join(f"{turn.role}\0{turn.content}" for turn in question.turns)
    digest = hashlib.blake2b(f"{seed}\0{sample}\0{texts}".encode("utf-8", "replace"), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1  # 31 bits: what every server takes


def _innermost(error: BaseException) -> str:
    """Class of what went wrong in the first place: the client's own classes tell time-outs and refusals apart badly."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__


def _raise_cause(call: asyncio.Task[None]) -> None:
    """Raises what ended a call, without the group that asyncio wraps it in."""
    if call.cancelled():
        raise FeedbackError("the judge was closed while it was being asked: what was answered is kept.")
    error: BaseException | None = call.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error from None
