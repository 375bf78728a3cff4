"""What a secret is: told by its name, by how it looks, or because an environment variable holds it.

Configs, submitted jobs, errors, logs and all output use these rules. Secrets are read from environment variables only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from rlaif_ray.errors import DocumentError

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
# Matched against a name in lower case with _ between its words. `stop_token` and `first_pass` don't match.
_NAME = re.compile(
    rf"(^|_)({_WORDS})(_|$)|(^|_)({_OWNERS})_?(keys?|tokens?)(_(id|value))?$|(^|_)(?<!first_)(?<!second_)(?<!forward_)"
    r"(?<!backward_)(?<!single_)(?<!two_)(?<!multi_)(pass|pat)$"
)
_WORD = re.compile(rf"(^|_)({_WORDS})(_|$)")
_ABOUT = re.compile(  # last words of names that describe a secret and hold none
    r"_(env|envs|variable|file|path|dir|folder|names?|type|mode|rate|count|length|len|policy|errors?|format|header|"
    r"required|needed|min|max|limit|ttl|timeout|s)$"
)
_NUMBERED = {"pass", "pat"}  # with a number they count something: `pass=2` is the second pass over the data
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
    """Whether an environment variable of this name may hold a secret: any KEY or TOKEN may."""
    return is_secret_name(name) or _VARIABLE.search(_words(name)) is not None


def _words(name: str) -> str:
    """A name in lower case with _ between its words, without a number at its end: `hfToken2` as `hf_token`."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"_?\d+$", "", re.sub(r"[^a-z0-9]+", "_", split.lower()).strip("_"))


# ---- Values ----------------------------------------------------------------------------------------------------------

_CONTAINS = 8  # shorter values of secret variables are not searched for: they stand in other words
# Words that stand in place of a secret, alone or together ("your-api-key-here"), and those that say what is to be done
# with secrets ("secrets: block").
_INSTEAD = """
    a allow allowed anonymous any anything api audit block blocked change changeme default deny denied detect
    disabled dummy empty enabled example fake false flag here hidden ignore insert key lm local localhost mask
    masked me mock my na needed no none not null off ollama on optional password placeholder put redact
    redacted removed replace report required sample sanitize secret sk some strict studio tbd test testing the
    todo token true undefined unknown unset unused used value vllm warn yes your
"""
_PLACEHOLDERS = frozenset(_INSTEAD.split())
# A run of letters and digits, such as keys have, and names of models and runs with such a prefix have not.
_RUN = r"(?=[A-Za-z]{0,80}\d)(?=\d{0,80}[A-Za-z])[A-Za-z0-9]{16,500}"
_SHAPES = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)|(?<![A-Za-z0-9_])(?:"
    r"sk-(?:proj|ant|or|svcacct|admin|lf)-(?=[\w-]{0,200}\d)[\w-]{12,500}|"
    r"(?:(?:sk|pplx|xai|nvapi|tvly)-|(?:rk|sk)_(?:live|test)_|(?:tgp|wandb|dop)_v1_)(?:[A-Za-z0-9]{0,40}[-_]){0,6}"
    rf"{_RUN}[\w-]{{0,500}}|"
    r"(?:hf|r8|fw|npm|gsk|esecret|api_org)_(?=[a-z]{0,80}[A-Z0-9])[A-Za-z0-9]{20,}|gh[opusr]_[A-Za-z0-9]{16}\w{4,}|"
    r"github_pat_\w{20,}|glpat-[\w-]{16,100}|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|xox[a-z]-[\w-]{10,300}|"
    r"AIza[\w-]{30,100}|ya29\.[\w-]{20,1000}|pypi-AgE[\w-]{20,500}|SG\.[\w-]{16,100}\.[\w-]{16,100}|"
    r"eyJ[\w-]{8,1000}\.[\w-]{8,4000}\.[\w-]{0,2000})",
    re.DOTALL,
)
# A password may have an @ in it: the last one before the path counts. AWS keys may have a / in them; where a port may
# stand, the / begins the path.
_LOGIN = re.compile(
    r"://(?:[^/\s\"'`]{1,500}|[^/@\s\"'`:]{0,200}:(?!\d+/)[^@\s\"'`]{1,500}(?:@[^/@\s\"'`]{1,200}){0,5})@"
)
_SCHEME = re.compile(r"\b(bearer|basic)(\s+)(?=\S*\d)[\w.~+/=-]{8,}", re.IGNORECASE)
_HEADER = re.compile(
    r"(?<![\w-])((?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?(?=(?:basic|bearer|digest|token|api-?key|aws4\S*) )"
    r"|(?:set-)?cookie[\"']?\s*[:=]\s*[\"']?(?=[\w.-]+=))[^\"'\n]+",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(r"(?<![\w.-])(?P<name>[A-Za-z_][\w.-]{0,200})(?P<sign>\\?[\"']?\s?[=:]\s?)(?!=|//|[\[{(])")
# In quotes, with \" and '' for a quote in it, up to the line's end where the second one was cut off; in quotes that are
# themselves in a JSON text; else up to a blank or a sign that ends it.
_VALUE = re.compile(
    r"""(?P<mark>["'])(?:(?!(?P=mark))[^\\\n]|\\.|(?P=mark){2}(?![\s,;)}\]]|\Z))*+(?:(?P=mark)|(?=\n)|\Z)"""
    r"""|(?P<inner>\\")(?:[^"\\\n]|\\\\\\"|\\(?!"))*+\\\""""
    r"""|[^\s"',;&)}\]]+(?:,(?![\w.-]{1,100}\s?[=:])[^\s"',;&)}\]]+)*+"""
    r"""(?:["'][^"'\n]*["']|(?P<more>[^"'=;\n]{0,200}(?=;)))?"""
)
_TOKEN_CHARACTERS = 256  # by which a `key` or `token` is told from other values
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_][\w-]*)*")  # a setting's name
_LINE = re.compile(r"[^\n]*[^\s]")
_NOTHING = re.compile(r"[\"']?(\*\*\*|\.{3}|\$\{?\w+\}?|<[^>]*>)?[\"']?")
_NUMBER = re.compile(r"[\"']?[+-]?\d[\d._]*(e[+-]?\d+)?[\"']?", re.IGNORECASE)
_RANDOM = re.compile(r"(?=.*\d)(?=.*[a-z])(?=.*[A-Z])[\w+/=-]{20,}|[0-9a-f]{32,}")
_OF_A_TOKEN = re.compile(r"[\"']?(?=.*\d)(?=.*[A-Za-z])[\w.+/=-]{10,}[\"']?")

_remembered: dict[str, str] = {}


def remember(secret: str, variable: str) -> None:
    """Masks this value too, everywhere in this process. It was read from `variable`, whose name may be any."""
    if len(secret) >= _CONTAINS:
        _remembered[secret] = variable


def masked(text: str) -> str:
    """`text` for people: each part that looks like a secret, is assigned to a secret's name, or is the value of a
    secret environment variable is replaced by `***`."""
    text = _SCHEME.sub(rf"\1\2{MASK}", _HEADER.sub(rf"\1{MASK}", _recognised(text)))
    parts, told, place = [], 0, 0  # up to `told` the text is in `parts`, from `place` on it is searched
    while found := _ASSIGNED.search(text, place):
        place = found.end()  # the value is searched too: url=http://host?token=...
        value = _VALUE.match(text, place, _end(found)) if _may_be_secret(found) else None
        if value is not None and _is_secret(found, value):
            value = _VALUE.match(text, place) or value
            mark = value["mark"] or value["inner"] or ""
            parts += [text[told:place], mark, MASK, mark]
            line = _LINE.match(text, place) if not mark and _is_a_lines_password(found) else None
            told = place = (line or value).end()
    return "".join([*parts, text[told:]])


def without_login(text: str) -> str:
    """`text` with the user and password of each URL replaced."""
    return _LOGIN.sub(f"://{MASK}@", text)


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with `***` for each value that `secrets_in` finds. Where it finds none, `config` is unchanged."""
    return {masked(str(key)): _masked(str(key), value, inside=False) for key, value in config.items()}


def secrets_in(values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """The key of each secret in a config, and why the value is taken for one. The secret itself is in neither."""
    yield from _found(values, (), inside=False)


def secrets_in_arguments(arguments: Sequence[str]) -> Iterator[str]:
    """The words of a command line that hold a secret, masked."""
    before = ""
    for argument in arguments:
        if before.startswith("-") and "=" not in before and is_secret_variable(before) and not argument.startswith("-"):
            yield f"{before} {MASK}"
        elif (shown := masked_word(argument)) != argument:
            yield shown
        before = argument


def masked_word(word: str) -> str:
    """A word of a command line for people. A setting that the loader takes is unchanged: it may be pasted."""
    name, equals, text = word.partition("=")
    if not equals or name.isupper() or not _DOTTED.fullmatch(name):  # no setting
        return masked(word)
    value: Any = text
    if text.lstrip()[:1] in ("[", "{", "'", '"'):
        from rlaif_ray.documents import parse_yaml

        try:
            value = parse_yaml(text).value
        except DocumentError:
            return masked(word)
    for part in reversed(name.split(".")):
        value = {part: value}
    if next(secrets_in(value), None) is None:
        return word
    shown = masked(word)
    return shown if shown != word else f"{name}={MASK}"


def _recognised(text: str) -> str:
    for secret in sorted(_known(), key=len, reverse=True):  # one may be a part of another
        text = text.replace(secret, MASK)
    return without_login(_SHAPES.sub(MASK, text))


def _known() -> dict[str, str]:
    """The variable of each known secret, by the secret as it is and as addresses have it."""
    values = {value: name for name, value in os.environ.items() if _holds_secret(name, value)} | _remembered
    return {
        form: name
        for value, name in values.items()
        if len(value) >= _CONTAINS and not _is_placeholder(value)
        for form in (value, quote(value, safe=""))
    }


def _holds_secret(variable: str, value: str) -> bool:
    """Of a variable such as CACHE_KEY, which may be the key of anything, the value tells."""
    if not is_secret_variable(variable) or _is_path(value):
        return False
    named = is_secret_name(variable) or _words(variable).endswith("auth")
    return named or any(_is_mixed(run) for run in re.findall(r"[A-Za-z0-9]{8,}", value))


def _is_mixed(run: str) -> bool:
    """Whether letters and digits are mixed as in no word with a number, or the run is long for one."""
    switches = len(re.findall(r"[A-Za-z](?=\d)|\d(?=[A-Za-z])", run))
    capitals = len(re.findall(r"[a-z](?=[A-Z])", run))
    return switches >= 3 or (switches > 0 and len(run) >= 20) or (capitals + switches >= 4 and len(run) >= 16)


def _is_placeholder(value: str) -> bool:
    words = re.split(r"[-_.\s]+", value.strip("\"' ").lower())
    return all(word in _PLACEHOLDERS or set(word) <= {"x"} or set(word) <= {"0"} for word in words)


def _is_path(value: str) -> bool:
    """Whether a variable such as SSH_KEY holds a path, which is no secret. A key of AWS may begin with a / too."""
    return value.startswith(("/", "~/", "./", "../")) and not re.fullmatch(r"/[A-Za-z0-9+/=]{39}", value)


def _may_be_secret(found: re.Match[str]) -> bool:
    name = found["name"].rpartition(".")[2]
    return is_secret_variable(name) or (_in_address(found) and _SIGNED.match(_words(name)) is not None)


def _end(found: re.Match[str]) -> int:
    """Where a value ends at the latest. One that may be none is searched again for others, so it must not be long."""
    name = found["name"].rpartition(".")[2]
    whole = is_secret_name(name) and not _is_folder(found)
    return len(found.string) if whole else found.end() + _TOKEN_CHARACTERS


def _is_secret(found: re.Match[str], value: re.Match[str]) -> bool:
    """Whether what is assigned is a secret: token=..., "api_key": "...", Password=...;"""
    name, sign = found["name"].rpartition(".")[2], found["sign"].strip()
    if _NOTHING.fullmatch(value[0]) or _is_placeholder(value[0]):
        return False
    number = _NUMBER.fullmatch(value[0].partition("/")[0] if _is_folder(found) else value[0])
    if number and (_is_folder(found) or _words(name) in _NUMBERED):
        return False
    shouted = name.isupper() and sign == "="  # the environment's own way to assign
    if not (is_secret_name(name) or shouted or _in_address(found) or _is_random(name, value[0])):
        return False
    # A word before a colon in a sentence is no key ("say the password: it is ..."), unless it is in quotes.
    before = found.string[max(0, found.start() - 9) : found.start()].rstrip(" ")[-1:]
    said = before not in ("", "\n", ",", "{") and sign == ":"
    return not (said and name.isalpha() and value[0].removesuffix(value["more"] or "").isalpha())


def _is_a_lines_password(found: re.Match[str]) -> bool:
    """Whether this begins a line as YAML has it, `password: several words`: the rest of the line is the password."""
    name = _words(found["name"].rpartition(".")[2])
    before = found.string[max(0, found.start() - 40) : found.start()].rpartition("\n")
    begins = not before[2].strip(" \t-") and (before[1] or found.start() <= 40)
    return bool(begins) and found["sign"] == ": " and re.search(r"pass(word|wd|phrase)s?$", name) is not None


def _is_folder(found: re.Match[str]) -> bool:
    """Whether this is a folder of a partitioned table: s3://bucket/access_key=2/part.parquet."""
    return found["sign"] == "=" and found.string[max(0, found.start() - 1) : found.start()] == "/"


def _in_address(found: re.Match[str]) -> bool:
    return found["sign"] == "=" and found.string[max(0, found.start() - 1) : found.start()] in tuple("?&#")


def _is_random(name: str, value: str) -> bool:
    """Whether the value of a `key` or `token`, which a text or a table has as well, is one that only a secret has."""
    expected = _OF_A_TOKEN if _words(name) == "token" else _RANDOM
    return is_secret_variable(name) and expected.fullmatch(value) is not None


# ---- Configs ---------------------------------------------------------------------------------------------------------


def _why(name: str, value: Any, inside: bool) -> str | None:
    """Why a config's value is taken for a secret; None where it isn't. `inside`: of a mapping with a secret's name."""
    if value in (None, "", MASK) or isinstance(value, bool | float):
        return None
    if isinstance(value, str) and (_is_placeholder(value) or (_words(name) in _NUMBERED and _NUMBER.fullmatch(value))):
        return None
    # A number is a password at most: `access_tokens: 3` counts them.
    if inside or (is_secret_name(name) and (isinstance(value, str) or _WORD.search(_words(name)))):
        return "its name is that of a secret"
    if not isinstance(value, str):
        return None
    if variable := next((name for secret, name in _known().items() if secret in value), None):
        return f"the value of the environment variable {variable} is in it"
    if without_login(value) != value:
        return "it has a user or password before the @"
    if _SHAPES.search(value) or _is_random(name, value):
        return "it looks like a key or token"
    if _recognised_whole(value) != value:
        return "it has a key, token or password in it"
    return None


def _recognised_whole(value: str) -> str:
    """Masks addresses, single words and connection strings. Prose about a password is unchanged."""
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
    """Whether all values under this name are secret. Those of a section that a user named, as a stage, are not."""
    return is_secret_name(name) and {"type", "job", "model", "path"}.isdisjoint(map(str, value))
