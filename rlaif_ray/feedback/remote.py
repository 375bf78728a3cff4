"""A judge behind an OpenAI-compatible endpoint: questions go out as chat completions, and the log-probabilities of what
it says, or its words alone, come back as answers.

All requests run on one asyncio loop in one thread, whichever threads ask.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from rlaif_ray.errors import FeedbackError, InputError
from rlaif_ray.feedback.endpoint import Endpoint, NoReplyError, OneAtATimeError
from rlaif_ray.feedback.replies import BadReplyError, Reply, read_probabilities, whole_tokens
from rlaif_ray.feedback.verdicts import parse_verdict
from rlaif_ray.types import Answer, Explanation, Question

if TYPE_CHECKING:
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

ANSWER_TOKENS = 8  # written for log-probabilities: white space, a quote or "Verdict:" may come before the answer
TEXT_TOKENS = 16  # written where the text is the answer
UNLISTED_SHARE = 0.05  # of what was found, that an answer which is not among the candidates may have to count as 0
EVENTS_A_TURN = 4

Result = TypeVar("Result", Answer, Explanation)


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
        self._endpoint = Endpoint(cfg)
        extra = hashlib.sha256(json.dumps(cfg.body, sort_keys=True).encode()).hexdigest()[:16]
        self.name = cfg.model
        self.identity = f"openai/{self._endpoint.url}/{cfg.model}/{cfg.answers}/{extra}"
        self._cfg = cfg
        self._budget = _Budget(cfg.max_cost, spent)
        self._slots = asyncio.Semaphore(cfg.concurrency)
        self._several = True  # whether the endpoint takes `n`; found out when it is asked
        self._understood = False  # whether any text of it could be parsed
        self._whole: set[str] = set()  # answers that are known to be single tokens of its model
        self._calls: set[asyncio.Task[None]] = set()
        self._loop = asyncio.SelectorEventLoop(_FewAtOnce())
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-judge", daemon=True)
        self._thread.start()

    @property
    def spent(self) -> float:
        """Cost so far, that of earlier runs included.

        Replies that did not say how many tokens, or could not be read, count with an upper estimate; requests that
        got no reply don't.
        """
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
        await self._endpoint.close()
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
            if last is None and not self._loop.is_closed():  # the caller wants no more
                self._loop.call_soon_threadsafe(lambda: calls[0].cancel())
                # A forgotten generator is collected by any thread, and the loop's must not wait for itself.
                while threading.current_thread() is not self._thread and not isinstance(results.get(), asyncio.Task):
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
            f"request could cost {most:.2g}): asking stopped. What was answered is kept; raise judge.max_cost and "
            f"start the same command again."
        )

    def _return_slot(self, most: float, _: object) -> None:
        self._budget.release(most)
        self._slots.release()

    # Questions

    def _body(self, question: Question, **parameters: Any) -> dict[str, Any]:
        messages = [{"role": turn.role, "content": turn.content} for turn in question.turns]
        parameters[self._cfg.token_limit] = parameters.pop("most_tokens")
        body = {"model": self._cfg.model, "messages": messages, **parameters, **self._cfg.body}
        return {name: value for name, value in body.items() if value is not None}

    def _answer_body(self, question: Question) -> dict[str, Any]:
        if self._cfg.answers == "text":
            return self._body(question, most_tokens=TEXT_TOKENS, temperature=0.0)
        # Greedy: a sampled token would take a likelier one's place in the list, and lead behind a space by chance.
        # The log-probabilities are the model's own all the same (vLLM, SGLang, OpenAI); `sharpened` finds others.
        return self._body(question, most_tokens=ANSWER_TOKENS, temperature=0.0, logprobs=True, top_logprobs=20)

    def _explain_body(self, question: Question, settings: GenerationSettings, have: int, wanted: int) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "most_tokens": settings.max_new_tokens,
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
        except NoReplyError as no_reply:
            return Answer((), failure=str(no_reply))
        told = Answer((), tokens_in=reply.tokens_in, tokens_out=reply.tokens_out, cost=self._cost(reply, most))
        if self._cfg.answers == "text":
            return self._in_words(question, reply, told)
        if reply.positions is None and reply.texts[0].strip():
            raise InputError(
                f"judge.answers=logprobs needs log-probabilities (for judge.model={self._cfg.model} the endpoint "
                f"{self._endpoint.url} gave a text without any): the probability of an answer can't be read. Use "
                f"judge.answers=text, whose labels are hard, or an endpoint that has them."
            )
        try:
            self._whole |= whole_tokens(reply.positions or (), question.answers)
            reading = read_probabilities(
                reply.positions or (),
                question.answers,
                question.answer_prefix,
                asks_for=question.asks_for,
                cut=reply.cut,
                whole=self._whole,
            )
        except BadReplyError as bad:
            return replace(told, failure=f"bad_reply: {bad}")
        if reading.sharpened:
            raise InputError(
                f"judge.answers=logprobs needs the model's own log-probabilities (the endpoint {self._endpoint.url} "
                f"gave those of a single certain token, as if after temperature 0): they would make every label 0 or "
                f"1. Set judge.extra_body.temperature=1, or judge.answers=text, whose labels are marked as hard."
            )
        total = math.fsum(reading.probabilities)
        if total <= 0.0 or reading.unlisted > UNLISTED_SHARE * total:
            return replace(told, failure="no_probability")
        return replace(
            told, probabilities=tuple(p / total for p in reading.probabilities), outside=max(0.0, 1.0 - total)
        )

    def _in_words(self, question: Question, reply: Reply, told: Answer) -> Answer:
        verdict = parse_verdict(
            reply.texts[0], question.answers, question.answer_prefix, asks_for=question.asks_for, cut=reply.cut
        )
        if verdict is not None:
            self._understood = True
            return replace(told, probabilities=tuple(float(a == verdict.answer) for a in question.answers), hard=True)
        if not self._understood and reply.cut and not reply.texts[0].strip():
            raise InputError(
                f"judge.model={self._cfg.model} wrote {reply.tokens_out} tokens and said nothing: it thinks before it "
                f"answers, and ran out of tokens. Give it room, such as judge.extra_body.{self._cfg.token_limit}=2048, "
                f"or turn its thinking off through judge.extra_body."
            )
        return replace(told, failure="unparsed")

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
            except OneAtATimeError:
                self._several = False
            except NoReplyError as failed:
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

    async def _reply(self, body: dict[str, Any], most: float) -> Reply:
        """What the endpoint says, its cost added up."""

        def lost() -> bool:
            self._budget.spent += most
            return self._budget.fits()

        reply = await self._endpoint.reply(body, lost)
        self._budget.spent += self._cost(reply, most)
        return reply

    def _most(self, body: dict[str, Any], requests: int) -> float:
        """More than so many requests with this body will cost, as far as one can know without a tokenizer."""
        texts = [turn["content"] for turn in body["messages"]]
        tokens_in = sum(len(text.encode("utf-8", "replace")) / 3 + 8 for text in texts)
        tokens_out = max(body.get("max_completion_tokens") or 0, body.get("max_tokens") or 0)
        return requests * (tokens_in * self._cfg.price_in + tokens_out * self._cfg.price_out) / 1e6

    def _cost(self, reply: Reply, most: float) -> float:
        if not reply.counted:
            return most
        return (reply.tokens_in * self._cfg.price_in + reply.tokens_out * self._cfg.price_out) / 1e6


class _Budget:
    """What was spent, and what the requests in flight cost at most. For the loop's thread alone."""

    def __init__(self, cap: float | None, spent: float) -> None:
        self.spent = spent
        self._cap = cap
        self._reserved = 0.0
        self._in_flight = 0
        self._changed = asyncio.Event()

    def fits(self, more: float = 0.0) -> bool:
        return self._cap is None or self.spent + self._reserved + more <= self._cap * (1 + 1e-9)  # sums are rounded

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


def _seed(seed: int, question: Question, sample: int) -> int:
    """Of the samples from this one on; the same wherever and beside whatever the question is asked."""
    texts = "\0".join(f"{turn.role}\0{turn.content}" for turn in question.turns)
    digest = hashlib.blake2b(f"{seed}\0{sample}\0{texts}".encode("utf-8", "replace"), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1  # 31 bits: what every server takes


def _raise_cause(call: asyncio.Task[None]) -> None:
    """Raises what ended a call, without the group that asyncio wraps it in."""
    if call.cancelled():
        raise FeedbackError("the judge was closed while it was being asked: what was answered is kept.")
    error: BaseException | None = call.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:
        raise error from None
