"""Rows of JSON files that users give: one object a line, or a list of objects."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from rlaif_ray.data.messages import shorten
from rlaif_ray.documents import BOM, JSON_BYTES, UTF_16, bounded_lines, kind_of, open_file, parse_json
from rlaif_ray.errors import DocumentError, InputError
from rlaif_ray.types import Message

LIST_BYTES = 1 << 28  # of a list in a .json file: unlike lines it is read as a whole, and takes several times as much

Cells = dict[str, Any]
Placed = tuple[str, Cells | InputError]  # where a row stands, and its cells or what is wrong with it


def json_lines(file: Path, example: str) -> Iterator[Placed]:
    """The objects of a file that has one on each line that is not blank, and where each stands: "f.jsonl, line 3".

    Halves of surrogate pairs, which models emit and no UTF-8 file can hold, become U+FFFD.

    Args:
        example: a good line, for messages.

    Raises:
        OSError: it can't be read.
        InputError: it is not a regular file.
    """
    with _named(file), open_file(file) as stream:
        for number, line in enumerate(bounded_lines(stream), 1):
            if line.strip():
                place = f"{file}, line {number}"
                yield place, _cells_of(line, place, example)
            if line.startswith(UTF_16):
                return  # all other lines would be told too


def json_document(file: Path, example: str) -> Iterator[Placed]:
    """The same of a file that holds a list of objects, one object, or one on each line; of a list "f.json, row 3".

    Raises:
        InputError: it is not JSON, or too large a list.
    """
    with _named(file), open_file(file) as stream:
        by_lines = _has_lines(stream)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        data = b"" if by_lines or size > LIST_BYTES else stream.read()
    if by_lines:
        yield from json_lines(file, example)
        return
    if size > LIST_BYTES:
        raise InputError(
            f"{file} is too large for a .json file (got {size:,} bytes): a list is read as a whole, up to "
            f"{LIST_BYTES:,} bytes. Write it as .jsonl, with one object on each line: that is read line by line."
        )
    try:
        value = parse_json(data, most_bytes=LIST_BYTES, nan=True)
    except DocumentError as error:
        raise InputError(f"{file} cannot be read as .json: it {error}. Mend it: a list of {example}.") from None
    del data
    for number, cells in enumerate(value if isinstance(value, list) else [value], 1):
        place = f"{file}, row {number}"
        if isinstance(cells, dict):
            yield place, mended(cells)
        else:
            wrong = f"{place}: not a JSON object (got {kind_of(cells)}). Every row must be one: {example}."
            yield place, InputError(wrong)


def _has_lines(stream: BinaryIO) -> bool:
    """Whether the first line that is not blank is an object of its own."""
    if not stream.read(1 << 16).removeprefix(BOM).lstrip().startswith(b"{"):
        return False
    stream.seek(0)
    line = b""
    while not line.removeprefix(BOM).strip():
        line = stream.readline(JSON_BYTES + 2)
    try:
        parse_json(line, nan=True)
    except DocumentError as error:
        return not error.syntax
    return True


def _cells_of(line: bytes, place: str, example: str) -> Cells | InputError:
    try:
        value = parse_json(line, nan=True)  # whoever needs a number names the key
        wrong = "" if isinstance(value, dict) else "not a JSON object ("
    except DocumentError as error:
        cut = "" if line.endswith(b"\n") else "the line is cut off: the file ends within it; "
        wrong = f"not a JSON object ({cut}it {error}; " if error.syntax else f"the row {error} ("
    if wrong:
        shown = shorten(line[:400].decode("utf-8", "replace").strip())
        return InputError(
            f"{place}: {wrong}got {shown}). Every line must be a JSON object in UTF-8, such as {example}. "
            "Mend the line, or remove it."
        )
    cells: Cells = mended(value) if b"\\u" in line else value  # only so can half a pair be written
    return cells


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Errors about a file as such get its name."""
    try:
        yield
    except DocumentError as error:
        raise InputError(f"{file} {error}. Name a file that has rows of JSON.") from None


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
