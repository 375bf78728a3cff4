"""Files of preference records: appended to in whole lines, or written whole; .jsonl and .parquet."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from rlaif_ray.data.preferences import ENDINGS, PreferenceRecord
from rlaif_ray.data.rows import good_rows, parquet_rows
from rlaif_ray.documents import bounded_lines, parse_json
from rlaif_ray.errors import DocumentError, InputError, RunError
from rlaif_ray.tracking.files import cut_rows
from rlaif_ray.writing import open_in_place, open_to_append, replacing

if TYPE_CHECKING:
    from types import TracebackType

    import pyarrow as pa

_ROWS_AT_A_TIME = 1000  # of a parquet file's row group
_COLUMNS = list(PreferenceRecord.model_fields)
_START = b'{"id":'  # of every line we write


class RecordWriter:
    """Appends records to a .jsonl or .parquet file, in whole lines however the process ends.

    A parquet file appears when `finish` is called; until then its records stand in `<name>.partial.jsonl` beside it.
    Opened again, a file goes on where it was: a last line cut short by a kill is dropped, and `count` says how many
    records are there. One process at a time may have it open.
    """

    def __init__(self, path: Path) -> None:
        """Opens or makes the file.

        Raises:
            InputError: it can't be written, another process writes it, or it holds something else than our records.
        """
        if path.suffix not in ENDINGS:
            raise InputError(
                f"records are written to {' or '.join(ENDINGS)} (got {path}). Give the file one of these endings."
            )
        self.path = path
        self._lines = path.with_name(f"{path.name}.partial.jsonl") if path.suffix == ".parquet" else path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._lines != path and path.exists() and not self._lines.exists():
                _unroll(path, self._lines)
            self._file = open_to_append(self._lines, buffering=0)
        except OSError as error:
            raise InputError(
                f"the records can't be written to {path} ({error.strerror or error}). Name a file in a folder that "
                "this process can write."
            ) from error
        try:
            self._lock()
            self.count = _whole_lines(self._lines)
        except InputError:
            self._file.close()
            raise

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def keep(self, count: int) -> None:
        """Drops all but the first `count` records."""
        cut_rows(self._lines, count)
        self.count = min(count, self.count)

    def write(self, records: Iterable[PreferenceRecord]) -> None:
        """Appends them in one write.

        Raises:
            RunError: the disk is full, or the file went away.
        """
        # Checked again: a record made with model_copy was not, and what is written must be readable.
        checked = [PreferenceRecord.model_validate(record.model_dump()) for record in records]
        left = memoryview("".join(record.model_dump_json() + "\n" for record in checked).encode())
        try:
            while left:  # a full disk takes part of it and says so the next time
                left = left[self._file.write(left) :]
        except OSError as error:
            raise RunError(
                f"{self._lines} can't be written ({error.strerror or error}). The records so far are in it: free space "
                "on that disk, then start the same command again."
            ) from error
        self.count += len(checked)

    def records(self) -> Iterator[PreferenceRecord]:
        """What is in it."""
        return _our_lines(self._lines)

    def replace(self, records: Iterable[PreferenceRecord]) -> None:
        """Puts as many other records in the place of those that are there; all, or, where `records` raises, none.

        `records` may read this writer's own meanwhile.

        Raises:
            RunError: the disk is full.
        """
        beside = self._lines.with_name(f".{self._lines.name}.{os.getpid()}.new")
        before, count = self._file, self.count
        try:
            beside.unlink(missing_ok=True)
            self._file, self.count = open_to_append(beside, buffering=0), 0
            self._lock()
            left = iter(records)
            while chunk := list(itertools.islice(left, _ROWS_AT_A_TIME)):
                self.write(chunk)
            assert self.count == count, "one for each"
            os.fsync(self._file.fileno())
            beside.replace(self._lines)
        except BaseException as error:
            if self._file is not before:
                self._file.close()
            self._file, self.count = before, count
            beside.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise RunError(f"{self._lines} can't be written ({error.strerror or error}). Free space.") from error
            raise
        before.close()

    def finish(self) -> Path:
        """Makes the file the wanted one, on disk. Returns its path."""
        os.fsync(self._file.fileno())
        if self._lines != self.path:
            _write_parquet(_our_lines(self._lines), self.path)
            self._lines.unlink()
        return self.path

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes when the process does
        except BlockingIOError:
            raise InputError(
                f"another process is writing {self.path}: the records of two runs would be mixed. "
                "Wait for it, or name another file."
            ) from None
        except OSError:
            pass  # a file system without locks


def write_records(records: Iterable[PreferenceRecord], path: Path) -> int:
    """Writes all of `path`, or, where `records` raises, leaves what was there. Returns how many there are."""
    beside = path.with_name(f".{path.stem}.{os.getpid()}.new{path.suffix}")
    left = iter(records)
    try:
        with RecordWriter(beside) as writer:
            writer.keep(0)
            while chunk := list(itertools.islice(left, _ROWS_AT_A_TIME)):
                writer.write(chunk)
            writer.finish().replace(path)
            return writer.count
    finally:
        beside.unlink(missing_ok=True)
        beside.with_name(f"{beside.name}.partial.jsonl").unlink(missing_ok=True)


def arrow_schema() -> pa.Schema:
    """The columns of a record in parquet and in `datasets`."""
    import pyarrow as pa

    text, number, whole = pa.string(), pa.float64(), pa.int64()
    types = dict.fromkeys(_COLUMNS, text)
    types |= dict.fromkeys(("p_a", "p_a_forward", "p_a_reversed", "answer_mass", "human", "cost"), number)
    types |= dict.fromkeys(("tokens_in", "tokens_out", "cut"), whole)
    types["prompt"] = pa.list_(pa.struct({"role": text, "content": text}))
    types["rationales"] = pa.list_(text)
    types["judge"] = pa.struct(dict.fromkeys(("model", "type", "template", "template_hash"), text))
    types["hard"] = pa.bool_()
    return pa.schema(types)


def record_batches(records: Iterable[PreferenceRecord]) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    schema, left = arrow_schema(), iter(records)
    while chunk := [record.model_dump() for record in itertools.islice(left, _ROWS_AT_A_TIME)]:
        yield pa.RecordBatch.from_pylist(chunk, schema)


def _write_parquet(records: Iterable[PreferenceRecord], path: Path) -> None:
    import pyarrow.parquet as pq

    try:
        with replacing(path) as file, pq.ParquetWriter(file, arrow_schema()) as writer:
            for batch in record_batches(records):
                writer.write_batch(batch)
    except OSError as error:
        raise RunError(f"{path} can't be written ({error.strerror or error}). Free space, then start again.") from error


def _unroll(path: Path, lines: Path) -> None:
    """A finished parquet file as lines again, to append to.

    Raises:
        InputError: it is not one of ours, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        ours = pq.read_schema(path).names == _COLUMNS
    except (pa.ArrowException, ValueError):
        ours = False
    if not ours:
        raise InputError(_not_ours(path))
    with replacing(lines) as file:
        for row in good_rows(parquet_rows(path, "records", columns=_COLUMNS)):
            try:
                record = PreferenceRecord.model_validate(row.cells)
            except ValidationError as error:
                raise InputError(_damaged(row.place, "other values than were written")) from error
            file.write(record.model_dump_json().encode() + b"\n")


def _whole_lines(path: Path) -> int:
    """How many lines a file has, once a last one without an end is cut off. It must be one of ours."""
    count = end = 0
    with open_in_place(path) as file:
        for line in file:
            whole = line.endswith(b"\n")
            if count == 0 and not (_is_ours(line) if whole else line.startswith(_START[: len(line)])):
                raise InputError(_not_ours(path))
            if not whole:
                break
            count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def _is_ours(line: bytes) -> bool:
    try:
        return list(parse_json(line, dict)) == _COLUMNS
    except DocumentError:
        return False


def _not_ours(path: Path) -> str:
    return (
        f"{path} exists and was not written by this command (it holds something other than whole preference records): "
        "it would be overwritten. Name another output, or move that file away."
    )


def _our_lines(path: Path) -> Iterator[PreferenceRecord]:
    with path.open("rb") as file:
        for number, line in enumerate(bounded_lines(file), 1):
            try:
                yield PreferenceRecord.model_validate(parse_json(line, dict))
            except ValueError as error:  # DocumentError, ValidationError
                told = f"it {error}" if isinstance(error, DocumentError) else "other values than were written"
                raise InputError(_damaged(f"{path}, line {number}", told)) from error


def _damaged(place: str, told: str) -> str:
    return (
        f"{place}, is damaged ({told}): this command goes on from these records. Mend it, or move the file away to "
        f"make them anew."
    )
