"""What counts as a secret, and values without it. Secrets come by environment variables alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

MASK = "***"
VARIABLES = ("_KEY", "_KEY_ID", "_TOKEN", "_SECRET", "_PASSWORD")  # ends of names of environment variables
_WORDS = {"key", "token", "secret", "password", "apikey", "passwd", "secrets", "passwords", "authorization"}
# A key of a setting that surely holds a secret: `stop_token` has one of the words above, and is none.
_SURELY = re.compile(
    r"(^|_)((api|access|auth|bearer|hf|private|secret|session)_?(keys?|tokens?)|secrets?|passwords?|passwd|authorization)$"
)
_CONTAINS = 8  # characters from which on a secret is also looked for inside longer values
_LOGIN = re.compile(
    r"://([^/@\s]+|[^/@\s:]*:(?!\d+/)[^@\s]+)@"
)  # AWS keys may have a / in them; a port may stand there


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with secrets replaced by `***`.

    Secret is what has a key with a whole word like key, token, secret or password in it (`api_key`, but not
    `max_new_tokens`), what equals or contains the value of an environment variable whose name ends in one of
    VARIABLES, and the user and password of a URL.
    """
    known = _known()
    return {str(key): _masked(value, _is_secret(str(key)), known) for key, value in config.items()}


def secrets_in(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where a config surely holds a secret: the key of each, and what it looks like. The secret is not in it."""
    yield from _found(values, (), _known())


def masked(text: str) -> str:
    """`text` with the values of secret environment variables, and the users and passwords of URLs, replaced."""
    for secret in sorted(_known(), key=len, reverse=True):  # one may be a part of another
        if len(secret) >= _CONTAINS:
            text = text.replace(secret, MASK)
    return without_login(text)


def without_login(text: str) -> str:
    """`text` with the user and password of each URL replaced."""
    return _LOGIN.sub(f"://{MASK}@", text)


def _known() -> set[str]:
    return {value for name, value in os.environ.items() if name.upper().endswith(VARIABLES) and value}


def _words(key: str) -> str:
    """A key in lower case with _ between its words: `hfToken` as `hf_token`."""
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())


def _is_secret(key: str) -> bool:
    words = _words(key).split("_")
    return not _WORDS.isdisjoint(words) or {"api", "keys"} <= set(words)


def _masked(value: Any, secret: bool, known: set[str]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _masked(inner, secret or _is_secret(str(key)), known) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(inner, secret, known) for inner in value]
    if secret:
        return None if value is None else MASK
    if not isinstance(value, str):
        return value
    if value in known or any(len(each) >= _CONTAINS and each in value for each in known):
        return MASK
    return without_login(value)


def _found(value: Any, key: tuple[str, ...], known: set[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _found(inner, (*key, str(name)), known)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _found(inner, key, known)
    elif isinstance(value, str) and value:
        # A path is no secret, though a variable such as SSH_KEY may hold it.
        if any(len(each) >= _CONTAINS and each in value and not each.startswith(("/", "~", ".")) for each in known):
            yield key, f"an environment variable named *{', *'.join(VARIABLES[:-1])} or *{VARIABLES[-1]} has the same"
        elif key and _SURELY.search(_words(key[-1])):
            yield key, "its name is that of a secret"
        elif _LOGIN.search(value):
            yield key, "it has a user or password before the @"
