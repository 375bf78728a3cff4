"""Reads JSON and YAML that somebody else may have written: within bounds, to plain values, or with one error.

Bounded are the size, the nesting, the digits of a number and what aliases multiply. A value is made of dict, list, str,
int, float, bool and None alone. All of the package reads through here, so that no file and no answer can end a job by
a crash of a parser, or of what walks the value afterwards.
"""

from __future__ import annotations

import json
import math
import re
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

import yaml

from rlaif_ray.errors import DocumentError

DEPTH = 100  # of lists and mappings in each other; pydantic's parser ends at 200, pyarrow's in a crash
DIGITS = 300  # of a number: so many are a finite float
JSON_BYTES = 64 << 20  # of a document, or of a line
YAML_BYTES = 2 << 20  # people write these, and its parser is slow
YAML_VALUES = 50_000  # with what aliases repeat

BOM = b"\xef\xbb\xbf"  # which Windows puts before UTF-8
UTF_16 = (b"\xff\xfe", b"\xfe\xff")

T = TypeVar("T")
KeyPath = tuple[str, ...]  # of keys, down to a value; items of lists by their number


# ---- Files -----------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, most_bytes: int = JSON_BYTES, *, below: Path | None = None) -> bytes:
    """All of a file that is meant to be small.

    Args:
        below: the folder that it must be in, links followed.

    Raises:
        OSError: it can't be read.
        DocumentError: it is larger, no file, or elsewhere.
    """
    with open_file(path, below=below) as file:
        data = file.read(most_bytes + 1)
    _check_size(data, most_bytes)
    return data


def open_file(path: Path, *, below: Path | None = None) -> BinaryIO:
    """A file, to read; raises as `read_bytes` does."""
    if below is not None and not is_below(path, below):
        raise DocumentError(f"leads out of {below.name} by a link")
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe or device may have no end; a folder says what it is
        raise DocumentError("is not a regular file")
    return path.open("rb")


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path is in a folder, once links are followed."""
    return path.resolve().is_relative_to(folder.resolve())


def bounded_lines(file: BinaryIO, most_bytes: int = JSON_BYTES) -> Iterator[bytes]:
    """A file's lines with their ends, without a byte-order mark. Of a longer line as much as `parse_json` refuses."""
    skip_mark(file)
    while line := file.readline(most_bytes + 2):
        if len(line) > most_bytes + 1 and not line.endswith(b"\n"):
            while (rest := file.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            line += b"\n" if rest else b""
        yield line


def skip_mark(file: BinaryIO) -> None:
    """Moves a file that was just opened behind its byte-order mark, if it has one."""
    if file.read(len(BOM)) != BOM:
        file.seek(0)


def _check_size(data: bytes, most_bytes: int, *, line: bool = False) -> None:
    if len(data) - (line and data.endswith(b"\n")) > most_bytes:
        raise DocumentError(f"is longer than {most_bytes:,} bytes")


def _decoded(data: bytes) -> str:
    if data.startswith(UTF_16):
        raise DocumentError("is UTF-16 (save it as UTF-8)")
    try:
        return data.removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        raise DocumentError(f"has a byte that is not UTF-8 (number {error.start + 1})") from None


def _check_kind(value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise DocumentError(f"holds {kind_of(value)} instead of {_KINDS[expected]}")


_KINDS = {dict: "a mapping", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}


def kind_of(value: Any) -> str:
    """A value's kind in the user's words."""
    return _KINDS.get(type(value), "a number")


@overload
def at(value: Any, *keys: str, expected: type[T]) -> T | None: ...
@overload
def at(value: Any, *keys: str) -> Any: ...
def at(value: Any, *keys: str, expected: type = object) -> Any:
    """value[key][key]..., None where a part is missing or, at the end, of another type than `expected`.

    A whole number is a float too, where it is finite; a bool is no number.
    """
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if expected is float and type(value) is int:
        return float(value)  # see DIGITS
    if isinstance(value, bool) and expected in (int, float):
        return None
    return value if isinstance(value, expected) else None


# ---- JSON ------------------------------------------------------------------------------------------------------------


@overload
def parse_json(
    data: bytes | str, expected: type[T], *, most_bytes: int = ..., nan: bool = ..., lenient: bool = ...
) -> T: ...
@overload
def parse_json(data: bytes | str, *, most_bytes: int = ..., nan: bool = ..., lenient: bool = ...) -> Any: ...
def parse_json(
    data: bytes | str,
    expected: type = object,
    *,
    most_bytes: int = JSON_BYTES,
    nan: bool = False,
    lenient: bool = False,
) -> Any:
    """The value of a JSON text in UTF-8, with or without a byte-order mark.

    Texts may hold halves of surrogate pairs: models emit them.

    Args:
        expected: of what type the value must be: dict, list or anything.
        nan: take NaN and infinities, which JSON does not allow and other programs write.
        lenient: these, and of a key that stands twice the last.

    Raises:
        DocumentError: it is not JSON, or beyond the bounds.
    """
    data = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    _check_size(data, most_bytes, line=True)
    if _is_deep(data):
        raise DocumentError(f"is nested more than {DEPTH} deep")
    try:
        value = (_LENIENT if lenient else _WITH_NAN if nan else _STRICT).decode(_decoded(data))
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        told = error.msg.removesuffix(" at")
        raise DocumentError(f"is not JSON: {told} at {line}column {error.colno}", syntax=True) from None
    except RecursionError:  # of a caller that is deep itself
        raise DocumentError("is nested too deep") from None
    _check_kind(value, expected)
    return value


def read_json(
    path: Path,
    expected: type[T],
    *,
    most_bytes: int = JSON_BYTES,
    lenient: bool = False,
    below: Path | None = None,
) -> T:
    """The value in a JSON file; raises as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, most_bytes, below=below), expected, most_bytes=most_bytes, lenient=lenient)


_ONE_KIND = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_BLOCK = 1 << 18  # bytes that are looked through at once: what is made of them takes up to 40 times as much


def _is_deep(data: bytes) -> bool:
    """Whether JSON is nested more than DEPTH deep, found without a parser: those recurse. Memory and time per byte do
    not grow with the data."""
    if data.count(b"[") + data.count(b"{") <= DEPTH:
        return False
    start, in_string, unclosed = 0, False, b""
    while start < len(data):
        block = data[start : start + _BLOCK]
        backslashes = len(block) - len(block.rstrip(b"\\"))
        if backslashes % 2 and len(block) == _BLOCK:  # the last one escapes what comes next
            block = block[:-1]
        start += len(block)
        parts = block.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
        outside = b"".join(parts[in_string::2])  # of strings
        in_string ^= len(parts) % 2 == 0
        left = _unclosed(unclosed + outside.translate(_ONE_KIND, _NO_BRACKETS))
        if left is None:
            return True
        unclosed = left
    return False


def _unclosed(brackets: bytes) -> bytes | None:
    """Those that are still open at the end; None where more than DEPTH are open at once."""
    for _ in range(DEPTH):  # each round takes the innermost away
        if b"[" * (DEPTH + 1) in brackets:
            return None
        fewer = brackets.replace(b"[]", b"")
        if len(fewer) == len(brackets):
            break
        brackets = fewer
    deep = brackets.count(b"[") > DEPTH or b"[]" in brackets
    return None if deep else brackets.lstrip(b"]")


def _whole(text: str) -> int:
    if len(text) > DIGITS:
        raise DocumentError(f"has a number of more than {DIGITS} digits")
    return int(text)


def _fraction(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise DocumentError(f"has a number too large ({text[:20]})")
    return value


def _no_number(text: str) -> float:
    raise DocumentError(f"has {text}, which JSON does not allow")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DocumentError(f"has the key {twice[:60]!r} twice")
    return value


_STRICT = json.JSONDecoder(parse_int=_whole, parse_float=_fraction, parse_constant=_no_number, object_pairs_hook=_once)
_WITH_NAN = json.JSONDecoder(parse_int=_whole, object_pairs_hook=_once)
_LENIENT = json.JSONDecoder(parse_int=_whole)


# ---- YAML ------------------------------------------------------------------------------------------------------------

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_FLOAT = re.compile(r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)$")
_INF_NAN = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$")
_OURS = {"tag:yaml.org,2002:int": [_INT], "tag:yaml.org,2002:float": [_FLOAT, _INF_NAN]}
_MERGE = "tag:yaml.org,2002:merge"
_SCALARS = {"str", "int", "float", "bool", "null"}  # tags of what JSON has too


def _numbers_of_yaml_1_2(kind: type[Any]) -> None:
    """Makes 1e-6 a number and 10:30, 010 and 2024-01-01 text; PyYAML follows YAML 1.1, where each is otherwise."""
    kind.yaml_implicit_resolvers = {
        first: [(tag, regexp) for tag, regexp in known if tag not in _OURS and not tag.endswith(":timestamp")]
        for first, known in kind.yaml_implicit_resolvers.items()
    }
    for tag, regexps in _OURS.items():
        for regexp in regexps:
            kind.add_implicit_resolver(tag, regexp, list("-+.0123456789"))


class _Loader(yaml.SafeLoader):
    """Reads our YAML."""

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        if self.flow_level >= DEPTH:  # looked at here: the time for a token grows with the level
            raise DocumentError(f"is nested more than {DEPTH} deep", self.line + 1)
        super().fetch_flow_collection_start(token)


class YamlDumper(yaml.SafeDumper):
    """Writes YAML that is read back unchanged here."""


_numbers_of_yaml_1_2(_Loader)
_numbers_of_yaml_1_2(YamlDumper)


@dataclass(slots=True)
class YamlDocument:
    """What a YAML text says, and where."""

    value: Any = None  # None also where there is nothing
    lines: dict[KeyPath, int] = field(default_factory=dict)  # of every value, or of its key; from 1
    written: dict[KeyPath, str] = field(default_factory=dict)  # as it stands there, of every value without quotes
    repeated: list[tuple[KeyPath, int, int]] = field(default_factory=list)  # keys again, their line and the first one's


def parse_yaml(text: bytes | str) -> YamlDocument:
    """What a YAML text in UTF-8 says. Keys are texts, as they stand there; 1e-6 is a number, and a date is text.

    Raises:
        DocumentError: it is not YAML, says something that JSON could not, or is beyond the bounds. Has the line.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    _check_size(data, YAML_BYTES)
    text = _decoded(data) if isinstance(text, bytes) else text
    with _yaml_errors(text):
        loader = _Loader(text)  # refuses control characters
        try:
            node = loader.get_single_node()
            builder = _Builder(loader)
            value = None if node is None else builder.value(node, (), ())
            return YamlDocument(value, builder.lines, builder.written, builder.repeated)
        finally:
            loader.dispose()


def read_yaml(path: Path, expected: type[T]) -> T:
    """The value of a YAML file.

    Raises:
        OSError: it can't be read.
        DocumentError: it is none of `expected` (dict, list or anything), has a key twice, or as `parse_yaml`.
    """
    found = parse_yaml(read_bytes(path, YAML_BYTES))
    for key, line, _ in found.repeated:
        raise DocumentError(f"has the key {'.'.join(key)[:60]} twice", line)
    _check_kind(found.value, expected)
    return found.value  # type: ignore[no-any-return]


def scalar_tag(text: str) -> str | None:
    """The tag of the scalar that all of a text is, such as STR. "" where there is nothing but comments, None where it
    is anything else, or no YAML."""
    try:
        node = yaml.compose(text, Loader=_Loader)
    except _YAML_ERRORS:
        return None
    if node is None:
        return ""
    whole = isinstance(node, yaml.ScalarNode) and node.end_mark.index == len(text.rstrip())
    return str(node.tag) if whole else None


STR = "tag:yaml.org,2002:str"
# What PyYAML raises over a text: its own, and what it does not expect under a tag such as !!bool or !!timestamp.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, OverflowError, RecursionError)


@contextmanager
def _yaml_errors(text: str) -> Iterator[None]:
    try:
        yield
    except DocumentError:
        raise
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        control = unicodedata.category(chr(error.character)) == "Cc"
        why = "which is a control character" if control else "which YAML does not allow"
        raise DocumentError(f"has the character #x{error.character:04x}, {why}", line) from None
    except RecursionError:
        raise DocumentError("is nested too deep") from None
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        told = [getattr(error, "context", None), getattr(error, "problem", None)]
        what = " ".join(map(str, filter(None, told))) or f"a value that does not fit its tag ({error})"
        raise DocumentError(f"is not valid YAML: {what}", mark.line + 1 if mark else None) from None


class _Builder:
    """Turns YAML nodes into plain values, with the line of each."""

    def __init__(self, loader: _Loader) -> None:
        self.lines: dict[KeyPath, int] = {}
        self.written: dict[KeyPath, str] = {}
        self.repeated: list[tuple[KeyPath, int, int]] = []
        self._loader = loader
        self._pairs: dict[int, dict[str, tuple[yaml.Node, yaml.Node]]] = {}  # of mappings that are under way, or done
        self._count = 0

    def value(self, node: yaml.Node, key: KeyPath, parents: tuple[yaml.Node, ...]) -> Any:
        line = node.start_mark.line + 1
        self.lines[key] = line
        self._count += 1
        if self._count > YAML_VALUES:
            raise DocumentError(f"has more than {YAML_VALUES:,} values, with those that aliases repeat", line)
        if node in parents:
            raise DocumentError("is not valid YAML: an alias contains itself", line)
        if len(parents) >= DEPTH:
            raise DocumentError(f"is nested more than {DEPTH} deep", line)
        if isinstance(node, yaml.MappingNode) and node.tag.endswith(":map"):
            return self._mapping(node, key, (*parents, node))
        if isinstance(node, yaml.SequenceNode) and node.tag.endswith(":seq"):
            return [self.value(child, (*key, str(i)), (*parents, node)) for i, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            self.written[key] = node.value
        return self._scalar(node, line)

    def _scalar(self, node: yaml.Node, line: int) -> Any:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if tag not in _SCALARS or not isinstance(node, yaml.ScalarNode):
            raise DocumentError(f"is not valid YAML: the tag !!{tag[:60]} is not supported", line)
        if tag in ("int", "float") and len(node.value) > DIGITS:
            raise DocumentError(f"has a number of more than {DIGITS} digits", line)
        try:
            value = self._loader.construct_object(node)
        except _YAML_ERRORS:  # not all of them are YAML's own
            raise DocumentError(f"is not valid YAML: {node.value[:60]!r} is not a valid !!{tag}", line) from None
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise DocumentError("has half of a surrogate pair, which is not a character", line)
        return value

    def _mapping(self, node: yaml.MappingNode, key: KeyPath, parents: tuple[yaml.Node, ...]) -> dict[str, Any]:
        seen: dict[str, int] = {}
        for name, _ in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                raise DocumentError("is not valid YAML: a key must be plain text", line)
            if name.value in seen and name.tag != _MERGE:
                self.repeated.append(((*key, name.value), line, seen[name.value]))
            seen.setdefault(name.value, line)
        values = {}
        for text, (name, child) in self._merged(node).items():
            values[text] = self.value(child, (*key, text), parents)
            self.lines[*key, text] = name.start_mark.line + 1
        return values

    def _merged(self, node: yaml.MappingNode) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Keys and values of a mapping by key, with those of the mappings that `<<` names: its own count, then the
        first one's that has it. PyYAML's own way makes a list of all, which grows with their product."""
        if id(node) not in self._pairs:
            found = self._pairs[id(node)] = {}
            own = {}
            for name, child in node.value:
                if name.tag != _MERGE:
                    own[name.value] = (name, child)
                    continue
                sources = child.value if isinstance(child, yaml.SequenceNode) else [child]
                if not all(isinstance(source, yaml.MappingNode) for source in sources):
                    raise DocumentError("is not valid YAML: << must name mappings", name.start_mark.line + 1)
                for source in sources:
                    for key, pair in self._merged(source).items():
                        found.setdefault(key, pair)
            found.update(own)
        return self._pairs[id(node)]
