"""The one place that knows a secret: by its name, by how it looks, or because an environment variable holds it.

Configs, submitted jobs, errors, logs and whatever is shown ask here. Secrets come by environment variables alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote

MASK = "***"
Key = tuple[str, ...]

# ---- Names -----------------------------------------------------------------------------------------------------------

_WORDS = (
    r"[a-z0-9]*(password|passwd|passphrase|apikey)s?|secrets?|authorization|credentials?|creds|bearer|cookies?|jwts?"
)
_OWNERS = (
    "api|access|account|auth|bearer|bot|client|deploy|encryption|github|gitlab|hf|hub|huggingface|id|openai|personal|"
    "private|refresh|secret|security|service|session|shared|signing|wandb"
)
# Of a name in lower case with _ between its words: `stop_token`, `max_tokens` and `first_pass` are none.
_NAME = re.compile(
    rf"(^|_)({_WORDS})(_|$)|(^|_)({_OWNERS})_?(keys?|tokens?)(_(id|value))?$|(^|_)(?<!first_)(?<!second_)(?<!forward_)"
    r"(?<!backward_)(?<!single_)(?<!two_)(?<!multi_)(pass|pat)$"
)
_WORD = re.compile(rf"(^|_)({_WORDS})(_|$)")
_ABOUT = re.compile(  # last words of what is said about a secret, and is none
    r"_(env|envs|variable|file|path|dir|folder|names?|type|mode|rate|count|length|len|policy|errors?|format|header|"
    r"required|needed|min|max|limit|ttl|timeout|s)$"
)
_VARIABLE = re.compile(r"(^|_)(keys?|tokens?(?<!s)|auth|sas)(_(id|value))?$")
_SIGNED = re.compile(r"^(sig|signature|code|key|token|auth|sas|x_(amz|goog)_(signature|credential|security_token))$")


@lru_cache(4096)
def is_secret_name(name: str) -> bool:
    """Whether a setting of this name, in any spelling (api_key, apiKey, APIKEY, x-api-key), holds a secret."""
    words = _words(name)
    found = _NAME.search(words) or words.endswith("_pwd") or name in ("pwd", "Pwd")  # PWD is the working folder
    return bool(found) and not _ABOUT.search(words)


@lru_cache(4096)
def is_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a secret: of those any KEY and TOKEN does."""
    return is_secret_name(name) or _VARIABLE.search(_words(name)) is not None


def _words(name: str) -> str:
    """A name in lower case with _ between its words, without a number at its end: `hfToken2` as `hf_token`."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"_?\d+$", "", re.sub(r"[^a-z0-9]+", "_", split.lower()).strip("_"))


# ---- Values ----------------------------------------------------------------------------------------------------------

_CONTAINS = 8  # characters from which on a secret variable's value is looked for
# What stands in such variables instead of a secret, and in configs and texts with another meaning.
_INSTEAD = {"disabled", "required", "optional", "anonymous", "undefined", "password", "localhost", "not-needed"}
_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)|(?<![A-Za-z0-9_])(?:"
    r"(?:(?:sk|pplx|xai|nvapi|tvly)-|(?:rk|sk)_(?:live|test)_|(?:tgp|wandb|dop)_v1_)(?=[\w-]{0,200}\d)[\w-]{16,500}|"
    r"(?:hf|r8|fw|npm|gsk|esecret|api_org)_[A-Za-z0-9]{20,}|gh[opusr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,100}|"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|xox[a-z]-[\w-]{10,300}|AIza[\w-]{30,100}|ya29\.[\w-]{20,1000}|"
    r"pypi-[\w-]{20,500}|SG\.[\w-]{16,100}\.[\w-]{16,100}|eyJ[\w-]{8,1000}\.[\w-]{8,4000}\.[\w-]{0,2000})",
    re.DOTALL,
)
# AWS keys may have a / in them; a port may stand there.
_LOGIN = re.compile(r"://([^/@\s]{1,500}|[^/@\s:]{0,200}:(?!\d+/)[^@\s]{1,500})@")
_SCHEME = re.compile(r"\b(bearer|basic)(\s+)(?=\S*\d)[\w.~+/=-]{8,}", re.IGNORECASE)
_HEADER = re.compile(
    r"(?<![\w-])((?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?(?=(?:basic|bearer|digest|token|api-?key|aws4\S*) )"
    r"|(?:set-)?cookie[\"']?\s*[:=]\s*[\"']?(?=[\w.-]+=))[^\"'\n]+",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(r"(?<![\w.-])(?P<name>[A-Za-z_][\w.-]{0,200})(?P<sign>\\?[\"']?\s?[=:]\s?)(?!=|//|[\[{(])")
_VALUE = re.compile(
    r"(?P<mark>\\?\"|')[^\"'\n]*(?P=mark)|[^\s\"',;&)}\]]+(?:[\"'][^\"'\n]*[\"']|(?P<more>[^\"'=;\n]{0,200}(?=;)))?"
)
_NOTHING = re.compile(r"[\"']?(\*\*\*|\.{3}|\$\{?\w+\}?|<[^>]*>|none|null|true|false)?[\"']?", re.IGNORECASE)
_RANDOM = re.compile(r"(?=.*\d)(?=.*[a-z])(?=.*[A-Z])[\w+/=-]{20,}|[0-9a-f]{32,}")
_OF_A_TOKEN = re.compile(r"[\"']?(?=.*\d)(?=.*[A-Za-z])[\w.+/=-]{10,}[\"']?")

_remembered: set[str] = set()


def remember(secret: str) -> None:
    """Masks this value too, wherever it is met in this process: a variable of any name may have held it."""
    if len(secret) >= _CONTAINS:
        _remembered.add(secret)


def masked(text: str) -> str:
    """`text` for people: without what looks like a secret, is assigned to the name of one, or is one's value."""
    text = _SCHEME.sub(rf"\1\2{MASK}", _HEADER.sub(rf"\1{MASK}", _recognised(text)))
    parts, told, place = [], 0, 0  # up to `told` the text is in `parts`, from `place` on it is searched
    while found := _ASSIGNED.search(text, place):
        place = found.end()  # the value is searched too: url=http://host?token=...
        value = _VALUE.match(text, place) if _may_be_secret(found) else None
        if value is not None and _is_secret(found, value):
            mark = value["mark"] or ""
            parts += [text[told:place], mark, MASK, mark]
            told = place = value.end()
    return "".join([*parts, text[told:]])


def without_login(text: str) -> str:
    """`text` with the user and password of each URL replaced."""
    return _LOGIN.sub(f"://{MASK}@", text)


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with all replaced by `***` that `secrets_in` finds: one that it passes stays as it is."""
    return {masked(str(key)): _masked(str(key), value, inside=False) for key, value in config.items()}


def secrets_in(values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Where a config holds a secret: the key of each, and what it looks like. The secret is not in it."""
    yield from _found(values, (), inside=False)


def secrets_in_arguments(arguments: Sequence[str]) -> Iterator[str]:
    """The words of a command line that hold a secret, masked."""
    before = ""
    for argument in arguments:
        if before.startswith("-") and "=" not in before and is_secret_variable(before) and not argument.startswith("-"):
            yield f"{before} {MASK}"
        elif (shown := masked(argument)) != argument:
            yield shown
        before = argument


def _recognised(text: str) -> str:
    for secret in sorted(_known(), key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, MASK)
    return without_login(_SHAPES.sub(MASK, text))


def _known() -> set[str]:
    """Values of secret variables, as they are and as addresses have them."""
    values = {value for name, value in os.environ.items() if is_secret_variable(name) and not _is_path(value)}
    values |= _remembered
    return {
        form
        for value in values
        if len(value) >= _CONTAINS and value.lower() not in _INSTEAD
        for form in (value, quote(value, safe=""))
    }


def _is_path(value: str) -> bool:
    """A path is no secret, though a variable such as SSH_KEY may hold it; of AWS's keys one may begin with a /."""
    return value.startswith(("/", "~/", "./", "../")) and not re.fullmatch(r"/[A-Za-z0-9+/=]{39}", value)


def _may_be_secret(found: re.Match[str]) -> bool:
    name = found["name"].rpartition(".")[2]
    return is_secret_variable(name) or (_in_address(found) and _SIGNED.match(_words(name)) is not None)


def _is_secret(found: re.Match[str], value: re.Match[str]) -> bool:
    """Whether what is assigned is a secret: token=..., "api_key": "...", Password=...;"""
    name, sign = found["name"].rpartition(".")[2], found["sign"].strip()
    if _NOTHING.fullmatch(value[0]):
        return False
    shouted = name.isupper() and sign == "="  # the environment's own way to assign
    if not (is_secret_name(name) or shouted or _in_address(found) or _is_random(name, value[0])):
        return False
    # In a sentence one word before a colon is none ("say the password: it is ..."), unless quotes say that it is a key.
    before = found.string[max(0, found.start() - 9) : found.start()].rstrip(" ")[-1:]
    said = before not in ("", "\n", ",", "{") and sign == ":"
    return not (said and name.isalpha() and value[0].removesuffix(value["more"] or "").isalpha())


def _in_address(found: re.Match[str]) -> bool:
    return found["sign"] == "=" and found.string[max(0, found.start() - 1) : found.start()] in tuple("?&#")


def _is_random(name: str, value: str) -> bool:
    """Whether a `key` or `token`, which may be of a text or a table as well, has a value that only a secret has."""
    expected = _OF_A_TOKEN if _words(name) == "token" else _RANDOM
    return is_secret_variable(name) and expected.fullmatch(value) is not None


# ---- Configs ---------------------------------------------------------------------------------------------------------


def _why(name: str, value: Any, inside: bool) -> str | None:
    """Why a config's value under this name is a secret; None where it is none. `inside` the mapping of a secret."""
    if value in (None, "", MASK) or isinstance(value, bool | float):
        return None
    # A number is a password at most: `access_tokens: 3` counts them.
    if inside or (is_secret_name(name) and (isinstance(value, str) or _WORD.search(_words(name)))):
        return "its name is that of a secret"
    if not isinstance(value, str):
        return None
    if any(secret in value for secret in _known()):
        return "a secret environment variable (such as *_KEY or *_TOKEN) has the same"
    if without_login(value) != value:
        return "it has a user or password before the @"
    if _SHAPES.search(value) or _is_random(name, value):
        return "it looks like a key or token"
    if _recognised_whole(value) != value:
        return "it has a key, token or password in it"
    return None


def _recognised_whole(value: str) -> str:
    """Addresses, single words and connection strings are masked; prose that speaks of a password is not."""
    pairs = [part for part in value.split(";") if part.strip()]  # Server=...;Password=...
    whole = len(value.split()) == 1 or (len(pairs) > 1 and all("=" in part for part in pairs))
    return masked(value) if whole else value


def _masked(name: str, value: Any, inside: bool) -> Any:
    if isinstance(value, Mapping):
        inner = inside or _holds_secrets(name, value)
        return {masked(str(key)): _masked(str(key), each, inner) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(name, each, inside) for each in value]
    if _why(name, value, inside) is None:
        return value
    text = value if not inside and isinstance(value, str) and not is_secret_name(name) else ""
    shown = masked(text)
    return shown if shown != text else MASK


def _found(value: Any, key: Key, inside: bool) -> Iterator[tuple[Key, str]]:
    if isinstance(value, Mapping):
        inner = inside or (bool(key) and _holds_secrets(key[-1], value))
        for name, each in value.items():
            if masked(str(name)) != str(name):
                yield (*key, str(name)), "it looks like a key or token itself"
            yield from _found(each, (*key, str(name)), inner)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _found(each, key, inside)
    elif key and (why := _why(key[-1], value, inside)) is not None:
        yield key, why


def _holds_secrets(name: str, value: Mapping[Any, Any]) -> bool:
    """Whether all that stands under this name is secret. A section whose name a user chose, as a stage's, is not."""
    return is_secret_name(name) and {"type", "job", "model", "path"}.isdisjoint(map(str, value))
