"""Files of records: exact round trips, whole lines however the writer ends, and nothing foreign overwritten."""

from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlaif_ray.data.preferences import PreferenceRecord, read_preferences
from rlaif_ray.data.record_files import RecordWriter, arrow_schema, write_records
from rlaif_ray.errors import InputError, RunError
from tests.pace import scaled
from tests.unit.data.records import NOT_UTF_8, record, records

ENDINGS = ["jsonl", "parquet"]
FIVE = [record(f"r{n}", p_a=n / 8) for n in range(5)]


def read(path: Path) -> list[PreferenceRecord]:
    return list(read_preferences(str(path)))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- round trips ----------------------------------------------------------------------------------------------------


@given(st.lists(records(), min_size=1, max_size=4, unique_by=lambda one: one.id))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(given_records: list[PreferenceRecord]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for ending in ENDINGS:
            file = Path(folder) / f"f.{ending}"
            assert write_records(given_records, file) == len(given_records)
            assert read(file) == given_records


@pytest.mark.parametrize("ending", ENDINGS)
def test_long_texts(ending: str, tmp_path: Path) -> None:
    long = record(response_a="naïve 😀 \n" * 10_000, rationales=("x" * 100_000,))
    write_records([long, record("other")], tmp_path / f"f.{ending}")
    assert read(tmp_path / f"f.{ending}") == [long, record("other")]


def test_parquet_of_lines_and_lines_of_parquet(tmp_path: Path) -> None:
    write_records(FIVE, tmp_path / "a.jsonl")
    write_records(read_preferences(str(tmp_path / "a.jsonl")), tmp_path / "b.parquet")
    write_records(read_preferences(str(tmp_path / "b.parquet")), tmp_path / "c.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()
    assert pq.read_schema(tmp_path / "b.parquet").equals(arrow_schema())
    assert files(tmp_path) == ["a.jsonl", "b.parquet", "c.jsonl"]


def test_a_line_holds_every_field(tmp_path: Path) -> None:
    write_records(FIVE[:1], tmp_path / "f.jsonl")
    [line] = (tmp_path / "f.jsonl").read_text().splitlines()
    assert list(json.loads(line)) == list(PreferenceRecord.model_fields) == arrow_schema().names
    assert json.loads(line)["prompt"] == [{"role": "user", "content": "question r0"}]


def test_more_records_than_a_row_group(tmp_path: Path) -> None:
    many = [record(f"r{n}") for n in range(2_345)]
    assert write_records(iter(many), tmp_path / "f.parquet") == 2_345
    assert read(tmp_path / "f.parquet") == many


# --- appending ------------------------------------------------------------------------------------------------------


def test_records_are_on_disk_after_every_write(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "f.jsonl") as writer:
        for done in range(1, 6):
            writer.write([FIVE[done - 1]])
            assert writer.count == done and read(tmp_path / "f.jsonl") == FIVE[:done]


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_file_goes_on_where_it_was(ending: str, tmp_path: Path) -> None:
    write_records(FIVE, tmp_path / f"once.{ending}")
    file = tmp_path / f"f.{ending}"
    with RecordWriter(file) as writer:
        assert writer.count == 0
        writer.write(FIVE[:2])  # and ends without a finish
    with RecordWriter(file) as writer:
        assert writer.count == 2
        writer.write(FIVE[2:4])
        assert writer.finish() == file
    with RecordWriter(file) as writer:  # a finished one too
        assert writer.count == 4
        writer.write(FIVE[4:])
        writer.finish()
    assert read(file) == FIVE and file.read_bytes() == (tmp_path / f"once.{ending}").read_bytes()
    assert files(tmp_path) == [file.name, f"once.{ending}"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_all_but_the_first_can_be_dropped(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"f.{ending}"
    write_records(FIVE, file)
    with RecordWriter(file) as writer:
        writer.keep(9)
        assert writer.count == 5
        writer.keep(2)
        assert writer.count == 2
        writer.write(FIVE[4:])
        writer.finish()
    assert read(file) == [*FIVE[:2], FIVE[4]]


def test_a_parquet_file_that_was_damaged_since(tmp_path: Path) -> None:
    file = tmp_path / "f.parquet"
    rows = [row.model_dump() for row in FIVE]
    pq.write_table(pa.Table.from_pylist([rows[0], {**rows[1], "p_a": 7.0}], arrow_schema()), file)
    with pytest.raises(InputError, match=r"f\.parquet, row 2, is damaged .other values .*move the file away"):
        RecordWriter(file)
    table = pa.Table.from_pylist(rows, arrow_schema())
    pq.write_table(table.set_column(1, "prompt", [NOT_UTF_8.take(pa.array([1] * len(rows)))]), file)
    with pytest.raises(InputError, match=r"f\.parquet, row 1: prompt can't be read \(got: 'utf-8' codec"):
        RecordWriter(file)
    assert files(tmp_path) == ["f.parquet"]


def test_a_finished_parquet_file_stays_until_the_next_finish(tmp_path: Path) -> None:
    file = tmp_path / "f.parquet"
    write_records(FIVE, file)
    with RecordWriter(file) as writer:
        writer.keep(1)
        assert read(file) == FIVE
    with RecordWriter(file) as writer:
        assert writer.count == 1  # what was dropped stays dropped


def test_an_empty_parquet_file_has_its_columns(tmp_path: Path) -> None:
    assert write_records([], tmp_path / "f.parquet") == 0
    assert pq.read_table(tmp_path / "f.parquet").schema.equals(arrow_schema())
    with RecordWriter(tmp_path / "f.parquet") as writer:
        assert writer.count == 0


def test_a_file_cut_at_any_byte_keeps_its_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    write_records(FIVE[:3], file)
    whole = file.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        file.write_bytes(whole[:cut])
        with RecordWriter(file) as writer:
            assert writer.count == sum(end <= cut for end in ends)
            writer.write(FIVE[writer.count : 3])
        assert file.read_bytes() == whole


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from rlaif_ray.data.record_files import RecordWriter\nfrom tests.unit.data.records import record\n"
        "with RecordWriter(Path(sys.argv[1])) as writer:\n"
        "    while True:\n"
        "        writer.write([record(f'r{writer.count + n}') for n in range(64)])\n"
    )
    file = tmp_path / "f.jsonl"
    process = subprocess.Popen([sys.executable, "-c", code, str(file)], cwd=Path(__file__).parents[3])
    try:
        deadline = time.monotonic() + scaled(60)
        while not (file.exists() and file.stat().st_size > 200_000):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with RecordWriter(file) as writer:  # the dead writer's lock is gone
        count = writer.count
    assert [one.id for one in read(file)] == [f"r{n}" for n in range(count)] and count > 64


def test_only_one_writer_at_a_time(tmp_path: Path) -> None:
    for name in ("f.jsonl", "f.parquet"):
        with RecordWriter(tmp_path / name) as writer:
            writer.write(FIVE[:1])
            with pytest.raises(InputError, match="another process is writing"):
                RecordWriter(tmp_path / name)
        with RecordWriter(tmp_path / name) as writer:
            assert writer.count == 1


# --- what can't be written ------------------------------------------------------------------------------------------


def test_a_full_disk_ends_the_run_and_keeps_what_is_there(tmp_path: Path) -> None:
    file, before = tmp_path / "f.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    with RecordWriter(file) as writer:
        writer.write(FIVE[:2])
        room = file.stat().st_size + 50
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))  # the file system takes 50 bytes more
        try:
            with pytest.raises(RunError, match=r"f\.jsonl can't be written .*File too large.*start the same command"):
                writer.write(FIVE[2:])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.stat().st_size == room
    with RecordWriter(file) as writer:
        assert writer.count == 2 and read(file) == FIVE[:2]


def test_a_record_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "f.jsonl") as writer:
        with pytest.raises(ValidationError):
            writer.write([FIVE[0], FIVE[1].model_copy(update={"p_a": math.nan})])
        assert writer.count == 0 and (tmp_path / "f.jsonl").read_bytes() == b""


def test_half_a_surrogate_pair_does_not_end_a_run(tmp_path: Path) -> None:
    write_records([FIVE[0].model_copy(update={"rationales": ("so \ud83d",)})], tmp_path / "f.jsonl")
    assert read(tmp_path / "f.jsonl")[0].rationales == ("so �",)


FOREIGN = {
    "lines.jsonl": b'{"prompt": "q", "response_a": "a", "response_b": "b", "label": 1}\n',
    "other.jsonl": b"notes\n",
    "torn.jsonl": b"notes without an end",
    "list.jsonl": b"[1, 2]\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_something_else_is_not_touched(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FOREIGN[name])
    with pytest.raises(InputError, match="exists and was not written by this command"):
        RecordWriter(tmp_path / name)
    assert (tmp_path / name).read_bytes() == FOREIGN[name] and files(tmp_path) == [name]


@pytest.mark.parametrize("content", ["rows", "rubbish"])
def test_a_parquet_file_of_something_else_is_not_touched(content: str, tmp_path: Path) -> None:
    file = tmp_path / "f.parquet"
    if content == "rows":
        pq.write_table(pa.Table.from_pylist([{"prompt": "q", "response_a": "a", "response_b": "b"}]), file)
    else:
        file.write_bytes(b"rubbish")
    before = file.read_bytes()
    with pytest.raises(InputError, match="exists and was not written by this command"):
        RecordWriter(file)
    assert file.read_bytes() == before and files(tmp_path) == ["f.parquet"]


def test_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"written to \.jsonl or \.parquet \(got .*f\.csv\)"):
        RecordWriter(tmp_path / "f.csv")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't be written to .*file/f\.jsonl"):
        RecordWriter(tmp_path / "file" / "f.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match=r"can't be written to .*folder\.jsonl"):
        RecordWriter(tmp_path / "folder.jsonl")


@pytest.mark.parametrize("ending", ENDINGS)
def test_records_that_break_off_leave_the_file_as_it_was(ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"f.{ending}"
    write_records(FIVE[:1], file)

    def broken():
        yield from FIVE
        raise InputError("row 6 is wrong")

    with pytest.raises(InputError, match="row 6"):
        write_records(broken(), file)
    assert read(file) == FIVE[:1] and files(tmp_path) == [file.name]
