"""Rows of files, one by one: JSON and parquet, whatever is in them; and what is said of rows that are wrong."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlaif_ray.data.json_rows import json_document, json_lines
from rlaif_ray.data.messages import Row, shorten
from rlaif_ray.errors import InputError
from rlaif_ray.paths import expand_home

_ROWS_AT_A_TIME = 256  # of a parquet file; responses can be long

_EXAMPLES = {  # of a row, by what the rows are
    "prompts": '{"prompt": "..."}',
    "preferences": '{"prompt": "...", "response_a": "...", "response_b": "..."}',
}


def json_rows(file: Path, what: str = "preferences", stem: str | None = None) -> Iterator[Row]:
    """The objects of a .jsonl file, which has one on every line that is not blank, or of a .json file, which may have
    them in a list.

    Args:
        what: that the rows are, for messages.
        stem: that their numbers begin with; None: the file's.

    Raises:
        InputError: the file can't be read, or a row is no object.
    """
    stem = stem or file.stem
    read = json_document if file.suffix == ".json" else json_lines
    try:
        if not file.stat().st_size:
            return
        for number, (place, cells) in enumerate(read(file, _EXAMPLES[what]), 1):
            yield Row(place, f"{stem}-{number}", cells)
    except OSError as error:
        raise InputError(f"the {what} {file} cannot be read ({error.strerror}). Give a readable file.") from error


def parquet_rows(file: Path, what: str = "preferences", stem: str | None = None) -> Iterator[Row]:
    """The rows of a parquet file, some at a time; arguments and errors are those of `json_rows`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, stem = itertools.count(1), stem or file.stem
    try:
        # By default every row group that will be read is fetched at once: all of the file.
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**16) as source:
            for batch in source.iter_batches(batch_size=_ROWS_AT_A_TIME):
                for cells in batch.to_pylist():
                    n = next(number)
                    yield Row(f"{file}, row {n}", f"{stem}-{n}", cells)
    except (pa.ArrowException, OSError) as error:
        told = shorten(" ".join(str(error).split()) or type(error).__name__, 200).rstrip(".")
        raise InputError(
            f"the {what} {file} cannot be read as .parquet from row {next(number)} on (got: {told}). "
            "Mend the file, or give it the ending of what it is."
        ) from error


def count_rows(path: str | Path, limit: int | None = None) -> int | None:
    """How many rows a file has, at most `limit`, where that is quickly known: for progress. None: it is not."""
    file = expand_home(path)
    count = None
    try:
        if file.suffix == ".jsonl" and file.is_file():
            with file.open("rb") as lines:
                count = sum(1 for line in lines if not line.isspace())
        elif file.suffix == ".parquet" and file.is_file():
            import pyarrow.parquet as pq

            count = pq.read_metadata(file).num_rows
    except (OSError, ValueError):  # whoever reads it says what is wrong; pyarrow's errors are ValueErrors
        return limit
    return limit if count is None else min(count, count if limit is None else limit)


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
