"""Rows of files: of parquet only what is needed is read, and they are counted in little memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif_ray.data import rows
from rlaif_ray.data.demonstrations import read_demonstrations
from rlaif_ray.data.preferences import read_preferences
from rlaif_ray.data.prompts import read_conversations
from rlaif_ray.data.rows import count_rows
from rlaif_ray.errors import InputError
from tests.unit.data.records import NOT_UTF_8

# Two values each, of which Python can't hold the second, or none.
UNREADABLE = {
    "a timestamp": pa.array([0, 2**60], pa.timestamp("us")),
    "a date": pa.array([0, 2**30], pa.date32()),
    "a duration": pa.array([0, 2**62], pa.duration("us")),
    "a time zone": pa.array([0, 1], pa.timestamp("us", tz="Foo/Bar")),
    "a text": NOT_UTF_8,
    "texts": pa.ListArray.from_arrays([0, 1, 2], NOT_UTF_8),
}
TEXTS = ["Why is that?", "And what now?"]
READERS: dict[str, tuple[Callable[[str], Iterable[Any]], dict[str, list[Any]]]] = {
    "prompts": (read_conversations, {"prompt": TEXTS}),
    "pairs": (read_preferences, {"prompt": TEXTS, "response_a": TEXTS, "response_b": TEXTS, "label": [1.0, 0.0]}),
    "TRL": (read_preferences, {"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS}),
    "demonstrations": (read_demonstrations, {"prompt": TEXTS, "response": TEXTS}),
}


def parquet(file: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), file)
    return file


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("what", UNREADABLE)
def test_what_stands_in_other_columns_does_not_matter(kind: str, what: str, tmp_path: Path) -> None:
    read, columns = READERS[kind]
    file = parquet(tmp_path / "f.parquet", {"before": UNREADABLE[what], **columns, "prompt.x": UNREADABLE[what]})
    assert len(list(read(str(file)))) == 2


@pytest.mark.parametrize("kind", READERS)
def test_what_can_not_be_read_in_a_needed_column(kind: str, tmp_path: Path) -> None:
    read, columns = READERS[kind]
    file = parquet(tmp_path / "f.parquet", {**columns, "prompt": NOT_UTF_8})
    with pytest.raises(InputError, match=r"f\.parquet, row 2: prompt can't be read \(got: 'utf-8' codec .*Correct"):
        list(read(str(file)))


def test_all_rows_that_can_not_be_read_are_told(tmp_path: Path) -> None:
    ids = pa.array([2**30, 0, 2**30, 2**30], pa.date32())
    file = parquet(tmp_path / "f.parquet", {"id": ids, "prompt": ["a", "b", "c", None]})
    with pytest.raises(InputError) as caught:
        read_conversations(str(file))
    told = [line.removeprefix(f"{file}, ").partition(" (")[0] for line in str(caught.value).splitlines()]
    assert told == ["row 1: id can't be read", "row 3: id can't be read", "row 4: id can't be read"]


def test_columns_of_one_name(tmp_path: Path) -> None:
    two, other = pa.array(["a", "b"]), pa.array([1, 2])
    pq.write_table(pa.table([two, other, other], names=["prompt", "x", "x"]), tmp_path / "f.parquet")
    assert len(read_conversations(str(tmp_path / "f.parquet"))) == 2
    pq.write_table(pa.table([two, two], names=["prompt", "prompt"]), tmp_path / "f.parquet")
    with pytest.raises(InputError, match=r"f\.parquet have two columns 'prompt'\. Rename"):
        read_conversations(str(tmp_path / "f.parquet"))


def test_all_columns_are_told_where_the_one_is_missing(tmp_path: Path) -> None:
    file = parquet(tmp_path / "f.parquet", {"question": TEXTS, "at": UNREADABLE["a date"]})
    with pytest.raises(InputError, match=r"no column 'prompt' \(its columns: question, at\)"):
        read_conversations(str(file))
    assert len(read_conversations(str(file), column="question")) == 2


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(st.sampled_from([b"\n", b" ", b"\r", b"a", b"{}", b"\xef\xbb\xbf", b"\n\n"])).map(b"".join))
def test_lines_are_counted_in_blocks(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(data)
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    expected = sum(1 for line in lines if line.strip())
    for block in (1, 3, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "_MIB", block)
            assert count_rows(tmp_path / "p.jsonl") == expected
            assert count_rows(tmp_path / "p.jsonl", 2) == min(2, expected)


def test_counting_takes_little_memory_and_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "SILENT_S", 0.0)
    with (tmp_path / "p.jsonl").open("wb") as file:
        file.write(json.dumps({"prompt": "a"}).encode() + b"\n")
        file.truncate(64 << 20)  # the second line
    tracemalloc.start()
    assert count_rows(tmp_path / "p.jsonl") == 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    shown = [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["counting rows: 1/64 MiB", "counting rows: 64/64 MiB"]
    assert count_rows(tmp_path / "p.jsonl", 1) == 1  # and no further
    assert [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()] == ["counting rows: 1/64 MiB"]


@pytest.mark.parametrize(("name", "content"), [("p.parquet", b"PAR1"), ("p.csv", b"a\n"), ("none.jsonl", None)])
def test_what_can_not_be_counted(name: str, content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert count_rows(tmp_path / name) is None and count_rows(tmp_path / name, 3) == 3
