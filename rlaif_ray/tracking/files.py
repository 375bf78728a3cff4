"""JSON lines and JSON in the run folder: whole rows or none, whole files or the old ones."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter, ValidationError

from rlaif_ray import documents
from rlaif_ray.documents import bounded_lines, parse_json
from rlaif_ray.errors import DocumentError, InputError, RunError
from rlaif_ray.writing import open_in_place, open_to_append, replace_text, replacing


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinities become None, tensors and numpy scalars plain numbers."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Iterable):
        return [plain(inner) for inner in value]
    return str(value)


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends one line per row in one write, flushed: a killed process can cut only the last line."""
    data = b"".join(_line(row) for row in rows)
    try:
        with open_to_append(path) as file:
            file.write(data)
    except OSError as error:
        raise RunError(_cannot_write(path, error)) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, none if it is missing; a last line cut short by a kill is left out.

    Raises:
        InputError: a line other than the last is no JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1]:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(parse_json(line, dict, lenient=True))
        except DocumentError as error:
            if number == len(lines):
                break
            raise InputError(
                f"{path} must hold one JSON object per line (got {line[:60]!r} in line {number}, which {error}): a "
                f"resumed run goes on from these rows. Repair or delete the line, or start anew with "
                f"checkpoint.resume=never."
            ) from error
    return rows


def read_rows_streaming(path: Path, kind: Any = None) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file as they come, none if it is missing; a last line cut short by a kill is left out.

    Args:
        kind: a TypedDict that every row must fit.

    Raises:
        InputError: a line other than the last is no JSON object, or not of the kind.
    """
    if not path.exists():
        return
    fits = TypeAdapter(kind).validate_python if kind is not None else lambda row: row
    with path.open("rb") as file:
        for number, line in enumerate(bounded_lines(file), start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = parse_json(line, dict, lenient=True)
                fits(row)
            except (DocumentError, ValidationError) as error:
                told = error if isinstance(error, DocumentError) else f"is not what was written: {_wrong(error)}"
                raise InputError(
                    f"{path} must hold one JSON object per line (got {line[:60]!r} in line {number}, which {told}): a "
                    f"run that is started again goes on from these rows. Remove the file to make them anew."
                ) from error
            yield row


def _wrong(error: ValidationError) -> str:
    """The first thing that is wrong with a row."""
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{key}: {first['msg']}" if key else str(first["msg"])


def cut_rows(path: Path, count: int) -> None:
    """Drops all but the first `count` lines, in place."""
    if not path.exists():
        return
    try:
        with open_in_place(path) as file:
            for _ in range(count):
                file.readline()
            file.truncate(file.tell())
    except OSError as error:
        raise RunError(_cannot_write(path, error)) from error


def rows_done(path: Path, total: int, chunk: int) -> int:
    """How many of `total` rows need not be made again: all if they are there, else those of whole chunks, to which the
    file is cut: the calls that follow are those of a run without an interruption."""
    rows = sum(1 for _ in read_rows_streaming(path))
    if rows >= total:
        return total
    cut_rows(path, rows // chunk * chunk)
    return rows // chunk * chunk


def replace_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes other rows in place of those of `path`, one by one; all of them, or, where `rows` raises, none.

    `rows` may read `path` meanwhile.
    """
    try:
        with replacing(path) as file:
            file.writelines(map(_line, rows))
    except OSError as error:
        raise RunError(_cannot_write(path, error)) from error


def keep_rows(path: Path, last_step: int) -> None:
    """Drops rows after `last_step`, the steps a resumed run repeats, and a last line cut short by a kill.

    Rows stand in the order of their steps, so the file is read from its end, one row at a time, and cut there: how
    long the run is costs neither time nor memory.

    Raises:
        InputError: a line that is read is no JSON object.
    """
    if not path.exists():
        return
    with open_in_place(path) as file:
        end = None  # of what stays
        for start, line in _lines_from_the_end(file):
            if not line.strip():
                continue
            try:
                is_later = parse_json(line, dict, lenient=True).get("step", 0) > last_step
            except (DocumentError, TypeError) as error:
                if not line.endswith(b"\n"):
                    end = start
                    continue
                raise InputError(
                    f"{path} must hold one JSON object per line (got {line[:60]!r} at byte {start}): a resumed run "
                    f"goes on from these rows. Repair or delete the line, or start anew with checkpoint.resume=never."
                ) from error
            if not is_later:
                if not line.endswith(b"\n"):
                    file.seek(0, os.SEEK_END)
                    file.write(b"\n")
                break
            end = start
        if end is not None:
            file.truncate(end)


def _lines_from_the_end(file: BinaryIO, block: int = 1 << 16) -> Iterator[tuple[int, bytes]]:
    """Each line with its first byte's place, the last line first."""
    start, tail = file.seek(0, os.SEEK_END), b""  # `tail` begins at `start`, in the midst of a line or at its begin
    while start > 0:
        size = min(max(block, len(tail)), start)  # twice as much each time within a long line: each byte is read once
        start = file.seek(start - size)
        tail = file.read(size) + tail
        end = len(tail)
        while (cut := tail.rfind(b"\n", 0, end - 1)) >= 0:
            yield start + cut + 1, tail[cut + 1 : end]
            end = cut + 1
        tail = tail[:end]
    if tail:
        yield 0, tail


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes `path` whole, or leaves what was there."""
    try:
        replace_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(_cannot_write(path, error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty if the file is missing or no JSON. What stands in it may be of any type: see
    `documents.at`."""
    try:
        return documents.read_json(path, dict, lenient=True)
    except (OSError, DocumentError):
        return {}


def prepare_folder(folder: Path, logs: Iterable[Path], resume_step: int, *, read_whole: Iterable[Path] = ()) -> None:
    """Makes the run folder and its logs: emptied for a new run, cut back to `resume_step` for a resumed one.

    Args:
        read_whole: those of which the run will read every row.

    Raises:
        InputError: the folder can't be written, or a row can't be read that will be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in logs:
            if resume_step:
                keep_rows(path, resume_step)
            else:
                replace_text(path, "")
        for path in read_whole:
            for _ in read_rows_streaming(path):
                pass
        if not resume_step:
            (folder / "summary.json").unlink(missing_ok=True)  # of a run whose rows are gone
    except OSError as error:
        raise InputError(
            f"run_dir must be a folder this process can write (got {folder}): {error.strerror or error}. "
            f"The run leaves its metrics, samples and checkpoints there. Choose another with run_dir=PATH."
        ) from error


def _line(row: Mapping[str, Any]) -> bytes:
    return _encode(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n")


def _encode(text: str) -> bytes:
    # A lone surrogate, which models do emit, becomes \udxxx: the JSON escape of itself.
    return text.encode("utf-8", "backslashreplace")


def _cannot_write(path: Path, error: OSError) -> str:
    return (
        f"{path} can't be written ({error.strerror or error}): the run would go on without a record. "
        f"Free space on that disk or restore the folder, then resume."
    )
