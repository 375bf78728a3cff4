"""One OpenAI-compatible endpoint: sends chat completions and says what its errors mean.

The official client sends, and retries what met 408, 409, 429, 5xx, a timeout or a broken connection; a reply that
can't be read is asked for again here. Raw replies are read instead of the client's typed ones, which cost as much
time as all the rest of a request.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlaif_ray.errors import FeedbackError, InputError
from rlaif_ray.feedback.replies import REPLY_BYTES, BadReplyError, Reply, read_reply
from rlaif_ray.output import shown
from rlaif_ray.secrecy import masked, remember

if TYPE_CHECKING:
    import httpx2
    from openai import APIError, APIStatusError

    from rlaif_ray.config.sections import OpenAIJudge

FIRST_WAIT_S, MOST_WAIT_S = 0.5, 8.0  # before a retry, doubling each time; as the client has it
LONGEST_WAIT_S = 120.0  # that the client waits because a Retry-After asks for it
DUMMY_KEY = "none"

_TOO_LONG = re.compile(
    r"context.{0,12}(length|window|size)|max_model_len|too many (input )?tokens|(prompt|input|message).{0,20} too long|"
    r"string_above_max_length|reduce the length|exceeds?.{0,40}(input|prompt|context).{0,20}tokens",
    re.IGNORECASE | re.DOTALL,
)


class NoReplyError(Exception):
    """The endpoint gave no reply that can be read; the message is the failure."""


class OneAtATimeError(Exception):
    """The endpoint does not write several texts in one request."""


class Endpoint:
    """The client with its key. For one asyncio loop."""

    def __init__(self, cfg: OpenAIJudge) -> None:
        """Sends nothing.

        Raises:
            InputError: the key's environment variable is not set, or the address is none.
        """
        import httpx2
        import openai

        base_url = cfg.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        self.url = shown_url(base_url)
        self._key = read_key(cfg, self.url, needed="api.openai.com" in self.url)
        if self._key != DUMMY_KEY:
            remember(self._key, cfg.api_key_env)
        self._cfg = cfg
        limits = httpx2.Limits(max_connections=cfg.concurrency, max_keepalive_connections=cfg.concurrency)
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=base_url,
            timeout=cfg.timeout_s,
            max_retries=cfg.max_retries,
            # With 256 in flight a request over aiohttp costs a quarter of what it does over httpx.
            http_client=openai.DefaultAioHttpClient(
                timeout=cfg.timeout_s,
                limits=limits,
                # A redirect would take the prompts, and perhaps the key, to whatever address a reply names.
                follow_redirects=False,
                event_hooks={"response": [_read_bounded]},
            ),
        )

    async def close(self) -> None:
        await self._client.close()

    async def reply(self, body: dict[str, Any], lost: Callable[[], bool]) -> Reply:
        """What the endpoint says.

        Args:
            lost: called for a reply that can't be read, though it may have been paid for; whether to ask again.

        Raises:
            NoReplyError: there is no readable reply after all retries, or the prompt is too long.
            OneAtATimeError: it does not take the body's `n`.
            InputError: it refuses the key, the model or a parameter.
            FeedbackError: the account is empty.
        """
        content = json.dumps(body).encode()
        retries, left = self._cfg.max_retries, self._cfg.max_retries
        while True:
            try:
                response = await self._post(content, body, left)
                # The client counts its retries in a header of its own.
                left -= int(response.request.headers.get("x-stainless-retry-count", 0))
                return read_reply(response.content)
            except BadReplyError as bad:
                if not lost() or left <= 0:
                    raise NoReplyError(f"bad_reply: {self._masked(str(bad))}") from None
            left -= 1
            await asyncio.sleep(min(FIRST_WAIT_S * 2 ** (retries - left - 1), MOST_WAIT_S) * random.uniform(0.75, 1.0))

    async def _post(self, content: bytes, body: dict[str, Any], retries: int) -> Any:
        """The endpoint's response, status 200.

        Errors of ours are raised outside the handlers: what the client raises holds the request, and so the key.
        """
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
            problem = NoReplyError(f"endpoint_error: {_innermost(error)}")
        except TimeoutError:
            problem = NoReplyError("endpoint_error: timeout")
        except BadReplyError as error:
            problem = error
        except Exception as error:  # what is no HTTP, or no header, gets through the client as it is
            problem = BadReplyError(type(error).__name__)
        raise problem

    def _refusal(self, error: APIStatusError, body: dict[str, Any]) -> Exception:
        """What an error status means."""
        status, said = error.status_code, self._said(error)
        got = f"(got {status}: {said})"
        if 300 <= status < 400:
            return self._elsewhere(error)
        if status in (401, 403):
            without = "" if self._key != DUMMY_KEY else ", which is not set"
            return InputError(
                f"the endpoint {self.url} refused the key of {self._cfg.api_key_env}{without} {got}. Put a valid key "
                f"into that environment variable, and check that it may use judge.model={self._cfg.model}."
            )
        if status == 404:
            return InputError(
                f"the endpoint {self.url} does not know judge.model={self._cfg.model} {got}. Name a model that it "
                f"lists under /models, or check judge.base_url: it usually ends in /v1."
            )
        if status == 402 or error.code == "insufficient_quota":
            return FeedbackError(
                f"the account at {self.url} is empty {got}: asking stopped. What was answered is kept; fill it up and "
                f"start the same command again."
            )
        if status == 413 or (status in (400, 422) and _TOO_LONG.search(f"{str(error.code)[:300]} {said}")):
            return NoReplyError("too_long")
        if status in (400, 422):
            if body.get("n", 1) > 1 and (error.param == "n" or re.search(r"\bn\b", said)):
                return OneAtATimeError()
            ours = [key for key in body if key not in ("model", "messages", "n")]
            about = next((key for key in ours if key == error.param or re.search(rf"\b{key}\b", said)), None)
            if about is not None:
                other = {"max_completion_tokens": "max_tokens", "max_tokens": "max_completion_tokens"}.get(about)
                remedy = f"set judge.token_limit={other}" if other else f"leave it out ({about}: null)"
                return InputError(
                    f"the endpoint {self.url} does not take {about}={body[about]!r} {got}. Set it to what "
                    f"judge.model={self._cfg.model} takes through judge.extra_body, or {remedy}; where it has no "
                    f"log-probabilities, use judge.answers=text."
                )
            return NoReplyError(f"endpoint_error: {status}: {said}")
        return NoReplyError(f"endpoint_error: {status}")

    def _elsewhere(self, error: APIStatusError) -> InputError:
        """What is said of a redirect: it is not followed, not even on the same host, where most lose the request."""
        target = self._masked(error.response.headers.get("location", "")).partition("?")[0]
        return InputError(
            f"the endpoint {self.url} sends its callers elsewhere (got {error.status_code}, to "
            f"{target or 'no address'}): prompts and the key are sent to no address but judge.base_url. If you trust "
            f"the other one, set judge.base_url to it."
        )

    def _said(self, error: APIError) -> str:
        body = error.body
        try:
            text = str(body.get("message") or body) if isinstance(body, dict) else str(body or error.message)
        except RecursionError:  # the client reads JSON without our bounds
            text = f"error code {getattr(error, 'status_code', 'unknown')}"
        return self._masked(text)

    def _masked(self, text: str) -> str:
        """`text` on one line and not too long, without the key: some endpoints say it back."""
        text = text if self._key == DUMMY_KEY else text.replace(self._key, "***")  # a short one too
        return shown(" ".join(text.split()))[:300]


async def _read_bounded(response: httpx2.Response) -> None:
    """Reads a reply, of any status, as the client would do next, but no more than REPLY_BYTES of what it unpacks to."""
    parts, size = [], 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > REPLY_BYTES:
            raise BadReplyError(f"longer than {REPLY_BYTES:,} bytes")
    response._content = b"".join(parts)  # where the client looks first; there is no other way to give it back


def shown_url(url: str) -> str:
    """The address as messages and records have it. Raises InputError when it is none, or holds a secret."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = parts = None
    if parts is None or parts.scheme not in ("http", "https") or not host:
        raise InputError(
            "judge.base_url (or OPENAI_BASE_URL) must be an address such as http://localhost:8000/v1 "
            f"(got {masked(url.rpartition('@')[2])!r}): nothing can be reached there. Write it with http:// or https://."
        )
    if parts.username is not None:
        raise InputError(
            f"judge.base_url (or OPENAI_BASE_URL) must not hold a user or password (got one before @{host}): it is "
            f"written into logs and records. Put the key into the environment variable that judge.api_key_env names."
        )
    shown_host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown_host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"


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


def _innermost(error: BaseException) -> str:
    """Class of what went wrong in the first place: the client's own classes tell time-outs and refusals apart badly."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__
