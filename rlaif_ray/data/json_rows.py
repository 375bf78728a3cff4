"""Rows of JSON files that users give: one object a line, or a list of objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlaif_ray.data.messages import shorten
from rlaif_ray.documents import bounded_lines, kind_of, open_file, parse_json, read_bytes
from rlaif_ray.errors import DocumentError, InputError
from rlaif_ray.types import Message

LIST_BYTES = 1 << 30  # of a .json file: unlike lines it is read as a whole


def json_lines(file: Path, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file that has one on each line that is not blank, and where each stands: "f.jsonl, line 3".

    Halves of surrogate pairs, which models emit and no UTF-8 file can hold, become U+FFFD.

    Args:
        example: a good line, for messages.

    Raises:
        OSError: it can't be read.
        InputError: a line is no object; when the iterator comes to it.
    """
    with _named(file), open_file(file) as stream:
        for number, line in enumerate(bounded_lines(stream), 1):
            if line.strip():
                place = f"{file}, line {number}"
                yield place, _object(line, place, example)


def json_document(file: Path, example: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of a file that holds a list of objects, one object, or one on each line; of a list "f.json, row 3"."""
    with _named(file):
        data = read_bytes(file, LIST_BYTES)
    try:
        value = parse_json(data, most_bytes=LIST_BYTES, nan=True)
    except DocumentError as error:
        if "Extra data" in str(error) and data.lstrip()[:1] == b"{":  # more follows the first object
            yield from json_lines(file, example)
            return
        raise InputError(f"{file} cannot be read as .json: it {error}. Mend it: a list of {example}.") from None
    for number, cells in enumerate(value if isinstance(value, list) else [value], 1):
        place = f"{file}, row {number}"
        if not isinstance(cells, dict):
            raise InputError(f"{place}: not a JSON object (got {kind_of(cells)}). Every row must be one: {example}.")
        yield place, mended(cells)


def _object(line: bytes, place: str, example: str) -> dict[str, Any]:
    try:
        value = parse_json(line, nan=True)  # whoever needs a number names the key
        reason = "" if isinstance(value, dict) else "another JSON value"
    except DocumentError as error:
        cut = "" if line.endswith(b"\n") else "the line is cut off: the file ends within it; "
        reason = f"{cut if str(error).startswith('is no JSON') else ''}it {error}"
    if reason:
        shown = shorten(line[:400].decode("utf-8", "replace").strip())
        raise InputError(
            f"{place}: not a JSON object ({reason}; got {shown}). Every line must be one, in UTF-8, such as {example}. "
            f"Mend the line, or remove it."
        )
    cells: dict[str, Any] = mended(value) if b"\\u" in line else value  # only so can half a pair be written
    return cells


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors about a file as such get its name."""
    try:
        yield
    except DocumentError as error:
        raise InputError(f"{file} {error}: rows are read from files of JSON. Name another.") from None


def mended(value: Any) -> Any:
    """`value` with halves of surrogate pairs as U+FFFD."""
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
