"""Questions per second to an OpenAI-compatible endpoint as a share of what its latency allows: concurrency / latency.

The endpoint is simulated in a process of its own: every reply comes `--latency-s` after its request, however many are
in flight. What is lost is ours and the client's: time between a reply and the next request in its place.
"""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import os
import resource
import statistics
import time
from typing import TYPE_CHECKING, Any

from tests.benchmarks.measure import alternate, arguments, json_output, machine, medians, timed

if TYPE_CHECKING:
    from rlaif_ray.feedback.remote import OpenAIAsker
    from rlaif_ray.types import Question

ANSWERS = ("1", "2")


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--latency-s", type=float, default=0.2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--seconds", type=float, default=6.0, help="that a round would take at best")
    parser.add_argument("--prompt-chars", type=int, default=3000)
    args = parser.parse_args()
    with json_output() as emit:
        emit(measure(args))


def measure(args: Any) -> dict[str, Any]:
    from rlaif_ray.types import Message, Question

    levels = args.concurrency
    text = "Which of the two replies is better? " * math.ceil(args.prompt_chars / 36)
    counts = {level: math.ceil(args.seconds / args.latency_s) * level for level in levels}
    questions = [Question((Message("user", f"{k} {text}"),), "", ANSWERS) for k in range(max(counts.values()))]
    context = multiprocessing.get_context("spawn")
    end, there = context.Pipe()
    endpoint = context.Process(target=_serve, args=(there, args.latency_s), daemon=True)
    endpoint.start()
    try:
        url = f"http://127.0.0.1:{end.recv()}/v1"
        askers = {level: _asker(url, level) for level in levels}
        cpu = dict.fromkeys(levels, 0.0)

        def ask(level: int, k: int) -> float:
            _ask(askers[level], questions[:level])  # connections are open, as they are in a long run
            before = _cpu_s()
            seconds = timed(lambda: _ask(askers[level], questions[: counts[level]]))
            cpu[level] = (_cpu_s() - before) / counts[level]
            return seconds

        sides = {str(level): lambda k, level=level: ask(level, k) for level in levels}
        seconds = alternate(sides, args.rounds)
        for asker in askers.values():
            asker.close()
    finally:
        endpoint.kill()
        endpoint.join()
    best = {level: counts[level] * args.latency_s / level for level in levels}
    shares = {level: round(best[level] / statistics.median(seconds[str(level)]), 4) for level in levels}
    return {
        "benchmark": "endpoint",
        "ratio": min(shares.values()),
        **{f"ratio_{level}": share for level, share in shares.items()},
        "questions_per_s": {level: round(shares[level] * level / args.latency_s, 1) for level in levels},
        "cpu_ms_per_question": {level: round(1e3 * cpu[level], 3) for level in levels},  # of our process
        **medians(seconds),
        "questions": counts,
        "latency_s": args.latency_s,
        "prompt_chars": len(text),
        **machine(),
    }


def _asker(url: str, concurrency: int) -> OpenAIAsker:
    from rlaif_ray.config.sections import OpenAIJudge
    from rlaif_ray.feedback.remote import OpenAIAsker

    return OpenAIAsker(OpenAIJudge(type="openai", model="judge", base_url=url, concurrency=concurrency))


def _ask(asker: OpenAIAsker, questions: list[Question]) -> None:
    answers = dict(asker.answer(questions))
    assert len(answers) == len(questions)
    assert all(answer.failure is None for answer in answers.values())


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# ---- The simulated endpoint: just enough of HTTP/1.1 to cost next to nothing -----------------------------------------


def _serve(end: Any, latency_s: float) -> None:
    os.dup2(2, 1)
    try:
        import uvloop as loops
    except ImportError:
        loops = asyncio  # type: ignore[assignment]
    response = _response()

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.received, self.loop = transport, b"", asyncio.get_running_loop()

        def data_received(self, data: bytes) -> None:
            self.received += data
            while (length := _length(self.received)) is not None and len(self.received) >= length:
                self.received = self.received[length:]
                self.loop.call_later(latency_s, self.transport.write, response)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=1024)
        end.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    loops.run(run())


def _length(received: bytes) -> int | None:
    """Bytes of the first request, once its head is there."""
    head = received.find(b"\r\n\r\n")
    if head < 0:
        return None
    lines = received[:head].lower()
    at = lines.index(b"content-length:")
    return head + 4 + int(lines[at + 15 :].split(b"\r\n", 1)[0])


def _response() -> bytes:
    """A chat completion with the log-probabilities of 20 tokens."""
    tokens = [*ANSWERS, *(f"word{k}" for k in range(18))]
    top = [{"token": t, "logprob": -0.7 - k, "bytes": list(t.encode())} for k, t in enumerate(tokens)]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "1", "refusal": None},
        "logprobs": {"content": [{**top[0], "top_logprobs": top}], "refusal": None},
        "finish_reason": "stop",
    }
    usage = {"prompt_tokens": 700, "completion_tokens": 1, "total_tokens": 701}
    body: dict[str, Any] = {"id": "chatcmpl-1", "object": "chat.completion", "created": int(time.time())}
    content = json.dumps({**body, "model": "judge", "choices": [choice], "usage": usage}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


if __name__ == "__main__":
    main()
