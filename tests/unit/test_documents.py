"""The one reader of JSON and YAML: within its bounds the value that the libraries give, beyond them one error."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlaif_ray import documents
from rlaif_ray.documents import (
    BOM,
    DEPTH,
    DIGITS,
    JSON_BYTES,
    YAML_BYTES,
    YAML_VALUES,
    YamlDumper,
    at,
    bounded_lines,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_yaml,
)
from rlaif_ray.errors import DocumentError
from tests.damage import damaged, odd_json
from tests.pace import scaled

finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_characters="\x85\u2028\u2029", exclude_categories=["Cs"]))  # PyYAML folds these
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | finite | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(inner) for key, inner in value.items())
    return all(map(is_plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | bool | None)


# ---- JSON ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(value=plain, indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_json_is_read_as_it_was_written(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert parse_json(text) == value
    assert parse_json(b"\xef\xbb\xbf" + text.encode()) == value


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=200) | odd_json({"a": [1, 2.5, {"b": "c"}], "d": None}) | st.text().map(str.encode))
def test_any_bytes_are_json_or_an_error(data: bytes) -> None:
    for options in ({}, {"nan": True}, {"lenient": True}):
        try:
            value = parse_json(data, **options)  # type: ignore[call-overload]
        except DocumentError as error:
            assert str(error)
            continue
        assert is_plain(value)
        repr(value), json.dumps(value)
    with suppress(DocumentError):
        assert type(parse_json(data, dict)) is dict


WRONG_JSON = {
    "deep": ("[" * 20_000 + "]" * 20_000, "nested more than 100 deep"),
    "deep and open": ("[" * 20_000, "nested more than 100 deep"),
    "deep objects": ('{"a":' * 20_000, "nested more than 100 deep"),
    "deep by turns": ('[{"a":' * 60 + "1" + "}]" * 60, "nested more than 100 deep"),
    "one too deep": ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "nested more than 100 deep"),
    "deep beside others": ("[[],[],[]," * (DEPTH + 1) + "1" + "]" * (DEPTH + 1), "nested more than 100 deep"),
    "deep behind a quote": ('["\\\\",' + "[" * 200 + "]" * 200 + "]", "nested more than 100 deep"),
    "digits": ("1" * (DIGITS + 1), "a number of more than 300 digits"),
    "digits that Python refuses": ("[1" + "0" * 5000 + "]", "a number of more than 300 digits"),
    "a float of digits": ("1" * 400 + ".0", "a number too large"),
    "an exponent": ("[1e999]", "a number too large (1e999)"),
    "a negative one": ("[-1e999]", "a number too large (-1e999)"),
    "NaN": ("[NaN]", "has NaN, which JSON does not allow"),
    "infinite": ("[-Infinity]", "has -Infinity, which JSON does not allow"),
    "twice": ('{"a": 1, "b": 2, "a": 3}', "has the key 'a' twice"),
    "UTF-16": ("[1]".encode("utf-16"), "is UTF-16"),
    "Latin-1": ("[1, 'é']".encode("latin-1"), "a byte that is not UTF-8 (number 6)"),
    "a cut character": ('["😀"]'.encode()[:5], "a byte that is not UTF-8"),
    "nothing": ("", "is not JSON: Expecting value at column 1"),
    "where": ('{"a": 1,\n "b": }', "is not JSON: Expecting value at line 2, column 7"),
    "more": ("{} {}", "is not JSON: Extra data at column 4"),
    "long": (b" " * (JSON_BYTES + 1), "longer than 67,108,864 bytes"),
}


@pytest.mark.parametrize(("text", "told"), WRONG_JSON.values(), ids=WRONG_JSON)
def test_wrong_json(text: str | bytes, told: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse_json(text)
    assert told in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.sampled_from([*'[]{}"\\,', "[[", "]]", "\\\\", '\\"', '"['])).map("".join), block=st.integers(2, 9)
)
def test_nesting_is_counted_across_blocks(text: str, block: int) -> None:
    depth = deepest = at = 0
    in_string = False
    while at < len(text):
        if text[at : at + 2] in ("\\\\", '\\"'):
            at += 1
        elif text[at] == '"':
            in_string = not in_string
        elif not in_string:
            depth = max(0, depth + (text[at] in "[{") - (text[at] in "]}"))
        deepest, at = max(deepest, depth), at + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_BLOCK", block)
        patch.setattr(documents, "DEPTH", 3)
        assert documents._is_deep(text.encode()) == (deepest > 3)


def test_memory_of_counting_does_not_grow() -> None:
    row = b'{"id":"x","prompt":[{"role":"user","content":"hello there what"}]},'
    data = b"[" + row * 40_000 + b"1]"  # 3 MB
    tracemalloc.start()
    assert not documents._is_deep(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_what_the_bounds_allow() -> None:
    assert parse_json("[" * DEPTH + "]" * DEPTH)
    assert parse_json("9" * DIGITS) == 10**DIGITS - 1 and math.isfinite(float(parse_json("9" * DIGITS)))
    assert parse_json('"' + "[{" * 20_000 + '"') == "[{" * 20_000  # brackets in text are text
    assert parse_json('["\\"", "' + "[" * 500 + '"]')[1] == "[" * 500
    assert len(parse_json("[" + "[]," * 50_000 + "1]")) == 50_001
    assert parse_json('{"model_max_length": 1000000000000000019884624838656}')  # transformers writes it
    assert parse_json('"\\ud800"') == "\ud800"  # models emit halves of pairs
    assert math.isnan(parse_json("NaN", nan=True)) and parse_json("1e999", lenient=True) == math.inf
    assert parse_json('{"a": 1, "a": 2}', lenient=True) == {"a": 2}


def test_the_kind_that_is_expected() -> None:
    assert parse_json("{}", dict) == {} and parse_json("[]", list) == []
    with pytest.raises(DocumentError, match="holds a list instead of a mapping"):
        parse_json("[]", dict)
    with pytest.raises(DocumentError, match="holds nothing instead of a list"):
        parse_json("null", list)


@pytest.mark.parametrize(
    "text", ["[" * (4 << 20), "[" * (2 << 20) + "]" * (2 << 20), '{"a":[' * (1 << 20), "[]" * (2 << 20)]
)
def test_hostile_json_takes_no_time(text: str) -> None:
    began = time.perf_counter()
    with pytest.raises(DocumentError):
        parse_json(text)
    assert time.perf_counter() - began < scaled(2.0)


# ---- YAML ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(value=plain)
def test_yaml_is_read_as_it_was_written(value: Any) -> None:
    def keyed(value: Any) -> Any:
        return {"k" + key.replace("<<", ""): keyed(v) for key, v in value.items()} if isinstance(value, dict) else value

    text = yaml.dump(keyed(value), Dumper=YamlDumper, allow_unicode=True)
    assert parse_yaml(text).value == keyed(value)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=100) | damaged(b"a: &x {b: [1, 2.5, yes]}\nc: *x\nd: !!str 5\ne: |\n  text\n<<: *x\n"))
def test_any_bytes_are_yaml_or_an_error(data: bytes) -> None:
    try:
        document = parse_yaml(data)
    except DocumentError as error:
        assert str(error)
        return
    assert is_plain(document.value) and all(line >= 1 for line in document.lines.values())
    json.dumps(document.value).encode()


def laughs(levels: int) -> str:
    return "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [{f'*a{k - 1}, ' * 9}]\n" for k in range(1, levels))


WRONG_YAML = {
    "deep": ("[" * 20_000, "nested more than 100 deep", 1),
    "deep and closed": ("a: 1\nb: " + "[" * 500 + "]" * 500, "nested more than 100 deep", 2),
    "deep by indentation": ("".join(" " * k + f"a{k}:\n" for k in range(150)), "nested", None),
    "deep by dashes": ("- " * 20_000, "nested too deep", None),
    "aliases": (laughs(12), f"more than {YAML_VALUES:,} values", None),
    "itself": ("a: &a [*a]", "an alias contains itself", 1),
    "itself by merging": ("a: &a\n  b: *a", "an alias contains itself", None),
    "digits": ("a: 1\nb: " + "1" * 400, "a number of more than 300 digits", 2),
    "hexadecimal digits": ("a: 0x" + "f" * 400, "a number of more than 300 digits", 1),
    "a date": ("a: !!timestamp 2024-01-01", "the tag !!timestamp is not supported", 1),
    "bytes": ("a: !!binary aGk=", "the tag !!binary is not supported", 1),
    "a set": ("a: !!set {b}", "the tag !!set is not supported", 1),
    "Python": ("!!python/object/apply:os.getcwd []", "the tag !!python/object/apply:os.getcwd is not supported", 1),
    "own tags": ("a: !mine b", "the tag !!!mine is not supported", 1),
    "no switch": ("a: !!bool maybe", "'maybe' is not a valid !!bool", 1),
    "no number": ('a: !!int ""', "'' is not a valid !!int", 1),
    "a key of a list": ("? [a]\n: 1", "a key must be plain text", 1),
    "half a character": ('a: 1\nb: "\\uD800"', "half of a surrogate pair", 2),
    "control": ("a: 1\nb: \x07", "the character #x0007, which is a control character", 2),
    "no character": ("a: 1\nb: \ufffe", "the character #xfffe, which YAML does not allow", 2),
    "merged with a number": ("a: 1\n<<: 5", "<< must name mappings", 2),
    "cut": ("a: [1,\nb: {", "is not valid YAML", None),
    "UTF-16": ("a: 1".encode("utf-16"), "is UTF-16", None),
    "bytes that are no text": (b"a: \xff", "a byte that is not UTF-8", None),
    "long": ("#" * (YAML_BYTES + 1), "longer than 2,097,152 bytes", None),
}


@pytest.mark.parametrize(("text", "told", "line"), WRONG_YAML.values(), ids=WRONG_YAML)
def test_wrong_yaml(text: str | bytes, told: str, line: int | None) -> None:
    began = time.perf_counter()
    with pytest.raises(DocumentError) as caught:
        parse_yaml(text)
    assert told in str(caught.value) and line in (None, caught.value.line)
    assert pickle.loads(pickle.dumps(caught.value)).line == caught.value.line
    assert time.perf_counter() - began < scaled(3.0)


def test_what_yaml_says() -> None:
    text = "a: 1e-6\nb: 2024-01-01\nc: 010\nd: no\ne: &x {f: 1}\ng: {<<: *x, h: ~}\n1: !!str 2\n"
    document = parse_yaml(text)
    assert document.value == {
        **{"a": 1e-6, "b": "2024-01-01", "c": "010", "d": False},
        **{"e": {"f": 1}, "g": {"f": 1, "h": None}, "1": "2"},
    }
    assert document.lines["g", "h"] == 6 and document.lines["e",] == 5
    assert parse_yaml("a: 1\nb: 2\na: 3").repeated == [(("a",), 3, 1)]
    assert parse_yaml("").value is None


def test_merges_do_not_multiply() -> None:
    text = "a0: &a0 {x: 1}\n" + "".join(f"a{k}: &a{k} {{<<: [{f'*a{k - 1}, ' * 9}], k{k}: 1}}\n" for k in range(1, 60))
    assert parse_yaml(text).value["a59"]["x"] == 1


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "a.yaml").write_text("a: 1\nb:\n  c: 2\n  c: 3\n")
    assert read_json(tmp_path / "a.json", dict) == {"a": 1}
    with pytest.raises(DocumentError, match=r"has the key b\.c twice"):
        read_yaml(tmp_path / "a.yaml", dict)
    with pytest.raises(DocumentError, match="longer than 7 bytes"):
        read_bytes(tmp_path / "a.json", 7)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(DocumentError, match="is not a regular file"):
            read_bytes(path)
    with pytest.raises(OSError):
        read_bytes(tmp_path)


@example(lines=[BOM], end=False)
@example(lines=[BOM + b"12345", BOM + b"12"], end=True)
@given(lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=6), end=st.booleans())
def test_lines_are_cut_where_they_are_too_long(lines: list[bytes], end: bool) -> None:
    data = b"\n".join(lines) + b"\n" * end
    found = list(bounded_lines(io.BytesIO(data), 5))
    whole = io.BytesIO(data.removeprefix(BOM)).readlines()
    assert len(found) == len(whole)
    for line, of_file in zip(found, whole, strict=True):
        assert line.endswith(b"\n") == of_file.endswith(b"\n")
        bare = of_file.removesuffix(b"\n")
        assert line == of_file if len(bare) <= 5 else 5 < len(line.removesuffix(b"\n")) <= 7


@pytest.mark.parametrize(
    ("value", "keys", "expected", "found"),
    [
        ({"a": {"b": 1}}, ("a", "b"), int, 1),
        ({"a": {"b": 1}}, ("a", "b"), float, 1.0),
        ({"a": {"b": True}}, ("a", "b"), int, None),
        ({"a": {"b": True}}, ("a", "b"), bool, True),
        ({"a": [1]}, ("a", "b"), int, None),
        ({"a": "x"}, ("a",), dict, None),
        (None, ("a",), str, None),
        ({"a": 1}, (), dict, {"a": 1}),
    ],
)
def test_a_value_at_a_path(value: Any, keys: tuple[str, ...], expected: Callable[..., Any], found: Any) -> None:
    assert at(value, *keys, expected=expected) == found and type(at(value, *keys, expected=expected)) is type(found)
