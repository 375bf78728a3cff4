"""Rows of any kind in the files that users give: read, or one error that names file and line; never another."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif_ray.data.demonstrations import read_demonstrations
from rlaif_ray.data.preferences import PreferenceRecord, read_preferences
from rlaif_ray.data.prompts import read_conversations
from rlaif_ray.data.record_files import RecordWriter
from rlaif_ray.errors import InputError
from rlaif_ray.types import Message
from tests.damage import odd_json

DEEP = "[" * 20_000 + "]" * 20_000
TURNS = [{"role": "user", "content": "Why?"}]
PROMPT = {"id": "a", "prompt": TURNS}
PAIR = {"id": "a", "prompt": TURNS, "response_a": "Yes.", "response_b": "No.", "p_a": 0.25, "tokens_in": 3}
CHAT = {"messages": [*TURNS, {"role": "assistant", "content": "So."}]}

READERS: dict[str, tuple[Callable[[str], Iterable[Any]], dict[str, Any]]] = {
    "prompts": (read_conversations, PROMPT),
    "preferences": (read_preferences, PAIR),
    "demonstrations": (read_demonstrations, CHAT),
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    ("row", "told"),
    [
        (DEEP, "nested more than 100 deep"),
        ('{"prompt": ' + DEEP + "}", "nested more than 100 deep"),
        ('{"prompt": "a", "more": ' + "9" * 400 + "}", "a number of more than 300 digits"),
        ('{"prompt": "a", "prompt": "b"}', "the row has the key 'prompt' twice"),
        ('{"prompt": "a" "b"}', "is not JSON: Expecting ',' delimiter at column 16"),
        ("\x00\x01", "is not JSON"),
    ],
    ids=["deep", "deep in a prompt", "digits", "a key twice", "no JSON", "binary"],
)
def test_a_row_beyond_the_bounds(kind: str, row: str, told: str, tmp_path: Path) -> None:
    read, good = READERS[kind]
    (tmp_path / "f.jsonl").write_text(f"{json.dumps(good)}\n\n{row}\n")
    with pytest.raises(InputError) as caught:
        list(read(str(tmp_path / "f.jsonl")))
    assert "f.jsonl, line 3: " in str(caught.value) and told in str(caught.value) and "Mend" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (DEEP, "p.json cannot be read as .json: it is nested more than 100 deep"),
        (f'[{{"prompt": {DEEP}}}]', "p.json cannot be read as .json: it is nested more than 100 deep"),
        ('{"prompt": "a"}\n{"prompt": ' + DEEP + "}", "nested more than 100 deep"),
        ('{"prompt": "a"}\n{"prompt": 1e999 }\n{', "line 3: not a JSON object"),
        ("5", "row 1: not a JSON object (got a number)"),
        ("[[]]", "row 1: not a JSON object (got a list)"),
    ],
)
def test_a_document_beyond_the_bounds(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(InputError) as caught:
        read_conversations(str(tmp_path / "p.json"))
    assert told in str(caught.value)


def test_text_is_text(tmp_path: Path) -> None:
    """Dates, which pyarrow made of them, and halves of surrogate pairs, which it refused."""
    rows = ['{"id": "2024-01-01", "prompt": "2024-01-01T00:00:00Z"}', '{"id": "b", "prompt": "a \\ud83d b"}']
    rows += [
        '{"id": "c", "prompt": [{"role": "user", "content": "\\ud800"}]}',
        '{"id": "\\u2028", "prompt": "\\u0000"}',
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "p.json").write_text(f"[{','.join(rows)}]")
    for name in ("p.jsonl", "p.json"):
        found = [turns[-1].content for turns in read_conversations(str(tmp_path / name))]
        assert found == ["2024-01-01T00:00:00Z", "a \ufffd b", "\ufffd", "\0"]


@pytest.mark.parametrize("kind", READERS)
def test_any_row(kind: str, tmp_path: Path) -> None:
    read, good = READERS[kind]
    file = tmp_path / "f.jsonl"

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(row=odd_json(good), first=st.booleans())
    def check(row: bytes, first: bool) -> None:
        lines = [row, json.dumps(good).encode()][:: 1 if first else -1]
        file.write_bytes(b"\n".join(lines) + b"\n")
        try:
            found = list(read(str(file)))
        except InputError as error:
            assert "f.jsonl" in str(error)
            return
        assert found
        for one in found:
            turns = one.prompt if isinstance(one, PreferenceRecord) else getattr(one, "messages", one)
            assert all(isinstance(turn, Message) and turn.content.encode() is not None for turn in turns)

    check()


WRITTEN = [
    '[{"role": "user", "content": ' + DEEP + "}]",
    "[{'role': 'user', 'content': " + "-" * 50_000 + "1}]",
    "[{'role': 'user', 'content': {[1]: 2}}]",
    "[{'role': 'user', 'content': b'x'}]",
    "[{'role': 'user', 'content': " + "(" * 150 + ")" * 150 + "}]",
    "[{'role': 'user', 'content': 1" + "0" * 5000 + "}]",
    "[{'role': 'user', 'content': 1" + "+1" * 20_000 + "}]",
]


@pytest.mark.parametrize("text", WRITTEN, ids=range(len(WRITTEN)))
def test_messages_written_in_a_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": text}) + "\n")
    with pytest.raises(InputError, match=r"p\.jsonl, line 1: "):
        read_conversations(str(tmp_path / "p.jsonl"))


def test_records_that_a_job_goes_on_from(tmp_path: Path) -> None:
    """A line that was damaged since is named; a cut last one is dropped."""
    path = tmp_path / "labels.jsonl"
    with RecordWriter(path) as writer:
        writer.write([PreferenceRecord(**{**PAIR, "id": str(k)}) for k in range(3)])
    good = path.read_bytes().splitlines(keepends=True)

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(line=odd_json(json.loads(good[1])))
    def check(line: bytes) -> None:
        path.write_bytes(good[0] + line.replace(b"\n", b" ") + b"\n" + good[2])
        try:
            with RecordWriter(path) as writer:
                assert all(isinstance(record, PreferenceRecord) for record in writer.records())
        except InputError as error:
            assert "labels.jsonl, line 2, is damaged" in str(error)

    check()
    path.write_bytes(good[0] + f'{{"id":{DEEP}}}\n'.encode())
    with RecordWriter(path) as writer, pytest.raises(InputError, match=r"line 2, is damaged \(it is nested more than"):
        list(writer.records())
