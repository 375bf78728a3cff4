"""Rows of files, one by one: JSON lines and parquet, whatever is in them; and what is said of rows that are wrong."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlaif_ray.data.messages import Row, shorten
from rlaif_ray.errors import InputError
from rlaif_ray.paths import expand_home
from rlaif_ray.types import Message

BOM = b"\xef\xbb\xbf"  # which Windows puts before UTF-8

_HALF_OF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # of surrogates; two of them may be a character
_ROWS_AT_A_TIME = 256  # of a parquet file; responses can be long

_EXAMPLES = {  # of a row, by what the rows are
    "prompts": '{"prompt": "..."}',
    "preferences": '{"prompt": "...", "response_a": "...", "response_b": "..."}',
}


def json_lines(file: Path, what: str = "preferences", stem: str | None = None) -> Iterator[Row]:
    """The objects of a file that has one on every line that is not blank.

    Args:
        what: that the rows are, for messages.
        stem: that their numbers begin with; None: the file's.

    Raises:
        InputError: the file can't be read, or a line is no object.
    """
    try:
        stream = file.open("rb")
    except OSError as error:
        raise InputError(f"the {what} {file} cannot be read ({error.strerror}). Give a readable file.") from error
    rows, stem = 0, stem or file.stem
    with stream:
        for number, line in enumerate(stream, 1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                rows += 1
                place = f"{file}, line {number}"
                yield Row(place, f"{stem}-{rows}", _object(line, place, what))


def _object(line: bytes, place: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode())
        reason = "" if isinstance(value, dict) else "another JSON value"
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1} is not UTF-8"
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else "the line is cut off: the file ends within it; "
        reason = cut + str(error).partition(": line")[0]
    if reason:
        shown = shorten(line.decode("utf-8", "replace").strip())
        raise InputError(
            f"{place}: not a JSON object ({reason}; got {shown}). Every line must be one, in UTF-8, such as "
            f"{_EXAMPLES[what]}. Mend or remove the line."
        )
    return dict(mended(value) if _HALF_OF_A_PAIR.search(line) else value)


def mended(value: Any) -> Any:
    """`value` with halves of surrogate pairs, which models emit and no UTF-8 file can hold, as U+FFFD."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return value
    if isinstance(value, Message):
        return Message(mended(value.role), mended(value.content))
    if isinstance(value, Mapping):
        return {mended(key): mended(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mended(inner) for inner in value]
    return value


def parquet_rows(file: Path, what: str = "preferences", stem: str | None = None) -> Iterator[Row]:
    """The rows of a parquet file, some at a time; arguments and errors are those of `json_lines`."""
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
