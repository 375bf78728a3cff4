"""An OpenAI-compatible endpoint whose answers tests set, and a proxy that puts faults in front of it or of a real one.

Both serve on loopback in this process, each in a thread of its own.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web


@dataclass(frozen=True)
class Said:
    """What the fake endpoint says to one request."""

    # One per token: the one sampled, and the probabilities of all that are listed.
    positions: Sequence[tuple[str, Mapping[str, float]]] = ()
    texts: Sequence[str] | None = None  # one per choice; default: the sampled tokens
    logprobs: bool = True  # false: none, though they were asked for
    usage: tuple[int, int] | None = (10, 1)
    finish: str = "stop"


def one(**probabilities: float) -> Said:
    """A single token; keywords are the answers' names with an underscore before them: `_1=0.7`."""
    named = {name.removeprefix("_"): p for name, p in probabilities.items()}
    return Said([(max(named, key=lambda token: named[token]), named)])


class _Server:
    """A web server in a thread, from construction to `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)

    async def _start(self) -> str:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    @property
    def connections(self) -> int:
        """How many are open."""
        assert self._runner.server is not None
        return len(self._runner.server.connections)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        raise NotImplementedError

    async def _stop(self) -> None:
        await self._runner.cleanup()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class FakeEndpoint(_Server):
    """Answers chat completions with `say(body)`, after `delay_s`."""

    def __init__(
        self,
        say: Callable[[dict[str, Any]], Said] = lambda _: one(_1=0.75, _2=0.25),
        *,
        delay_s: float | Callable[[dict[str, Any]], float] = 0.0,
        key: str | None = None,
    ) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = self.finished = 0
        self._say, self._delay_s, self._key = say, delay_s, key
        super().__init__()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        body = await request.json()
        self.bodies.append(body)
        if request.path != "/v1/chat/completions":
            return _error(404, f"no such path: {request.path}")
        if self._key is not None and request.headers.get("Authorization") != f"Bearer {self._key}":
            return _error(401, f"Incorrect API key provided: {request.headers.get('Authorization')}")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self._delay_s(body) if callable(self._delay_s) else self._delay_s)
        finally:
            self.in_flight -= 1
        self.finished += 1
        return web.json_response(completion(self._say(body), body))


def completion(said: Said, body: Mapping[str, Any]) -> dict[str, Any]:
    """A chat completion as the API has it."""

    def entry(token: str, p: float) -> dict[str, Any]:
        return {"token": token, "logprob": math.log(p) if p > 0 else -9999.0, "bytes": list(token.encode())}

    texts = said.texts if said.texts is not None else ["".join(token for token, _ in said.positions)]
    choices: list[dict[str, Any]] = [
        {"index": k, "message": {"role": "assistant", "content": text}, "finish_reason": said.finish, "logprobs": None}
        for k, text in enumerate(texts)
    ]
    if said.logprobs and body.get("logprobs"):
        content = []
        for token, listed in said.positions:
            top = [entry(t, p) for t, p in listed.items()][: body.get("top_logprobs", 0)]
            content.append({**entry(token, listed.get(token, 1e-9)), "top_logprobs": top})
        choices[0]["logprobs"] = {"content": content}
    reply: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
    reply["choices"] = choices
    if said.usage is not None:
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        reply["usage"] = dict(zip(names, (*said.usage, sum(said.usage)), strict=True))
    return reply


def _error(status: int, message: str, headers: Mapping[str, str] | None = None, **more: Any) -> web.Response:
    return web.json_response({"error": {"message": message, **more}}, status=status, headers=headers)


@dataclass(frozen=True)
class Fault:
    """What the proxy does to one request instead of passing it on."""

    kind: str  # "status", "hang" (no reply), "cut" (half a reply), "body" (`text`), "bomb" (gzip), "garbage" (no HTTP)
    status: int = 0
    message: str = "injected"
    headers: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)  # further keys of the error, such as code
    text: str = '{"choices": [{"mess'


class FaultProxy(_Server):
    """Passes requests on to `upstream`, but for those that a fault waits for: each fault takes the next request."""

    def __init__(self, upstream: str) -> None:
        self.faults: deque[Fault] = deque()
        self.requests = 0
        self.times: list[float] = []  # when each request came, seconds
        self.replies: list[dict[str, Any]] = []  # that were passed back
        self._upstream = upstream.removesuffix("/v1")
        self._session: aiohttp.ClientSession | None = None
        super().__init__()

    def inject(self, kind: str, *, times: int = 1, **values: Any) -> None:
        """The next `times` requests meet this fault; a number is an error status."""
        fault = Fault("status", status=int(kind), **values) if kind.isdigit() else Fault(kind, **values)
        self.faults.extend([fault] * times)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests += 1
        self.times.append(self._loop.time())
        content = await request.read()
        if not self.faults:
            return await self._pass_on(request, content)
        fault = self.faults.popleft()
        if fault.kind == "status":
            return _error(fault.status, fault.message, fault.headers, **fault.more)
        if fault.kind == "hang":
            await asyncio.sleep(60)
        if fault.kind == "body":
            body = fault.text.encode("utf-8", "surrogatepass")
            return web.Response(
                body=body, status=fault.status or 200, headers=fault.headers, content_type="application/json"
            )
        if fault.kind == "bomb":  # 4 MiB in 4 kB
            body = gzip.compress(b" " * (4 << 20))
            return web.Response(body=body, status=fault.status or 200, headers={"Content-Encoding": "gzip"})
        assert request.transport is not None
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
        if fault.kind == "garbage":
            request.transport.write(b"this is no HTTP\r\n\r\n")
        else:
            assert fault.kind == "cut", fault.kind
            await response.prepare(request)
            await response.write(b'{"choices": [')
            await asyncio.sleep(0.02)  # so that the half is on its way
        request.transport.close()
        return response

    async def _pass_on(self, request: web.Request, content: bytes) -> web.StreamResponse:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        kept = {k: v for k, v in request.headers.items() if k in ("Authorization", "Content-Type")}
        url = self._upstream + request.path_qs
        async with self._session.request(request.method, url, data=content, headers=kept) as reply:
            text = await reply.text()
            if reply.status == 200 and text.startswith("{"):
                self.replies.append(json.loads(text))
            return web.Response(text=text, status=reply.status, content_type=reply.content_type)

    async def _stop(self) -> None:
        if self._session is not None:
            await self._session.close()
        await super()._stop()
