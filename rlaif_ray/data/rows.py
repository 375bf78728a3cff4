"""Rows of files, one by one: JSON and parquet, whatever is in them; and what is said of rows that are wrong."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.data.json_rows import json_document, json_lines
from rlaif_ray.data.messages import Row, shorten
from rlaif_ray.documents import skip_mark
from rlaif_ray.errors import InputError
from rlaif_ray.paths import expand_home
from rlaif_ray.tracking.progress import SILENT_S, ItemProgress

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

RowOrError = Row | InputError  # a row, or what is wrong with it: reading goes on behind it

_ROWS_AT_A_TIME = 256  # of a parquet file; responses can be long
_MIB = 1 << 20

_EXAMPLES = {  # of a row, by what the rows are
    "prompts": '{"prompt": "..."}',
    "preferences": '{"prompt": "...", "response_a": "...", "response_b": "..."}',
}


def json_rows(file: Path, what: str = "preferences", stem: str | None = None) -> Iterator[RowOrError]:
    """The objects of a .jsonl file, which has one on every line that is not blank, or of a .json file, which may have
    them in a list.

    Args:
        what: that the rows are, for messages.
        stem: that their numbers begin with; None: the file's.

    Raises:
        InputError: the file can't be read.
    """
    stem = stem or file.stem
    read = json_document if file.suffix == ".json" else json_lines
    try:
        if not file.stat().st_size:
            return
        for number, (place, cells) in enumerate(read(file, _EXAMPLES[what]), 1):
            yield cells if isinstance(cells, InputError) else Row(place, f"{stem}-{number}", cells)
    except OSError as error:
        raise InputError(f"the {what} {file} cannot be read ({error.strerror}). Give a readable file.") from error


def parquet_rows(
    file: Path, what: str = "preferences", stem: str | None = None, *, columns: Collection[str]
) -> Iterator[RowOrError]:
    """The rows of a parquet file, some at a time; other arguments and errors are those of `json_rows`.

    Args:
        columns: whose values are needed. Others are not read, as they may hold what Python can't; their cells are None.
    """
    import pyarrow.parquet as pq

    count, stem = 0, stem or file.stem
    try:
        # By default every row group that will be read is fetched at once: all of the file.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**16) as source:
            names = source.schema_arrow.names
            needed = list(dict.fromkeys(name for name in names if name in columns))
            twice = next((name for name in needed if names.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"the {what} {file} have two columns {twice!r}. Rename or remove one of them.")
            empty = dict.fromkeys(names)
            for cells in _parquet_cells(source, needed):
                count += 1
                place = f"{file}, row {count}"
                if isinstance(cells, dict):
                    yield Row(place, f"{stem}-{count}", {**empty, **cells})
                else:
                    yield InputError(f"{place}: {cells} Correct the row, or remove it.")
    except InputError:
        raise
    except Exception as error:  # what pyarrow raises about a file has no common root
        raise InputError(
            f"the {what} {file} cannot be read as .parquet from row {count + 1} on (got: {_told(error)}). "
            "Mend the file, or give it the ending of what it is."
        ) from error


def _parquet_cells(source: pq.ParquetFile, names: list[str]) -> Iterator[dict[str, Any] | str]:
    """Of each row the cells in these columns, or what is wrong with one of them."""
    if not names:
        yield from ({} for _ in range(source.metadata.num_rows))
        return
    for batch in source.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=names):
        own = batch.select(names)  # "a" is also taken for the beginning of "a.b"
        try:
            rows = own.to_pylist()
        except Exception:  # a date beyond Python's, a text that is not UTF-8, an unknown time zone, ...
            rows = [_cells_or_reason(own, row) for row in range(own.num_rows)]
        yield from rows


def _cells_or_reason(batch: pa.RecordBatch, row: int) -> dict[str, Any] | str:
    cells = {}
    for name in batch.schema.names:
        try:
            cells[name] = batch.column(name)[row].as_py()
        except Exception as error:
            return f"{name} can't be read (got: {_told(error)})."
    return cells


def _told(error: Exception) -> str:
    return shorten(" ".join(str(error).split()) or type(error).__name__, 200).rstrip(".")


def good_rows(rows: Iterable[RowOrError]) -> Iterator[Row]:
    """The rows, up to the first that is wrong.

    Raises:
        InputError: there is one, when the iterator comes to it.
    """
    for row in rows:
        if isinstance(row, InputError):
            raise row
        yield row


def count_rows(path: str | Path, limit: int | None = None) -> int | None:
    """How many rows a file has, at most `limit`, for progress. None: only reading it would tell.

    Lines are counted in little memory, however long they are, and no further than to `limit`; progress of that is shown
    where it takes longer than a second.
    """
    file = expand_home(path)
    count = None
    try:
        if file.suffix == ".jsonl" and file.is_file():
            count = _count_lines(file, limit)
        elif file.suffix == ".parquet" and file.is_file():
            import pyarrow.parquet as pq

            count = pq.read_metadata(file).num_rows
    except Exception:  # whoever reads it says what is wrong
        return limit
    return limit if count is None else min(count, count if limit is None else limit)


def _count_lines(file: Path, limit: int | None) -> int:
    """The lines that are not blank; at least `limit` where there are more."""
    count, begun = 0, False  # the line under way has something in it
    size = -(-file.stat().st_size // _MIB)
    with file.open("rb") as stream, ItemProgress("counting rows", size, "MiB", after_s=SILENT_S) as progress:
        skip_mark(stream)
        while (limit is None or count < limit) and (block := stream.read(_MIB)):
            filled = [bool(part) and not part.isspace() for part in block.split(b"\n")]
            filled[0] |= begun
            begun = filled.pop()
            count += sum(filled)
            progress.advance(1)
    return count + begun


class WrongRows:
    """Errors of rows, told together: a person mends them in one go."""

    SHOWN = 5  # in full
    MOST = 20  # then reading ends

    def __init__(self) -> None:
        self._found: list[InputError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes an InputError that comes within it."""
        try:
            yield
        except InputError as error:
            self._found.append(error)

    @property
    def full(self) -> bool:
        return len(self._found) >= self.MOST

    def check(self) -> None:
        """Raises InputError where there are any."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            lines = [str(error) for error in self._found[: self.SHOWN]]
            more = len(self._found) - self.SHOWN
            if more > 0:
                lines.append(f"and {more} more rows are wrong{'; reading ended there' if self.full else ''}.")
            raise InputError("\n".join(lines))
